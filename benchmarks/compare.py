"""What is the method worth? Six arms on the sample data, at equal numbers of gradient evaluations.

    make compare                               # the table, with seed 0 computed live beside the committed seeds
    python benchmarks/compare.py --write 0     # a seed whose results are kept in benchmarks/compare; resumes
    python benchmarks/compare.py --report      # the committed seeds only

The protocol, fixed before the first table:

- Arms (options of ``realworld.py``, pipeline ``pretrain``): pre-training on bicubic downsampling; uniform weights; the
  paper's system (relation ``embedding``, weighted gradients); relation weights (``predicted_transfer``) without the
  camera fit; the fit alone; fit and relation.
- Every arm trains EDSR (32 features, 4 blocks) at x4 for STEPS steps of 16 patches of 24² LQ pixels, and adapts it to
  the five support pairs for ADAPTATION steps of 8 patches. Neither ``predicted_transfer`` nor ``embedding`` takes
  gradients of the network; the training of their DRNs is not counted.
- The adaptation of every arm is tuned alike: learning rate and replay are those that restore two held-out support
  pairs best after adapting to the three others, and all five are then adapted to. (The networks, and the fit, have been
  trained with all five, if the arm uses them in training.)
- Reported on the sample camera's three held-out images: PSNR-Y before and after adaptation. Differences are paired by
  image and seed, with a 95 % interval by Student's t, against the arm without relation and fit that is best after
  adaptation.
"""

from __future__ import annotations

# Before BasicSR: realworld imports drtl_plugin, which repairs BasicSR.
from common import HERE, interval, markdown_table, pairs_by_name, write_rows
from realworld import ARMS, Arm, options_of, score, train

import argparse  # isort: skip
import copy
import csv
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from drtl_plugin.meta.adaptation import last
from drtl_plugin.models import DRTLModel
from drtl_plugin.options.convert import parse_section
from drtl_plugin.options.sections import AdaptOptions
from drtl_plugin.sources.sample import SCALE, prepare_sample_data

RESULTS = HERE / 'compare'
STEPS, ADAPTATION = 350, 200
RATES, REPLAYS = (1e-4, 3e-4, 1e-3), (0.0, 0.5)
HELD_OUT = (1, 3)  # a portrait, and a rocket
FIT_AND_RELATION = copy.deepcopy(ARMS['DRTL'].drtl)
FIT_AND_RELATION['weighting']['relation'] = 'predicted_transfer'
COMPARED: dict[str, Arm] = {
    'bicubic': ARMS['bicubic'],
    'uniform': ARMS['uniform'],
    'paper': ARMS['paper pretrain'],
    'relation': ARMS['DRTL predicted weights'],
    'fit alone': ARMS['fit alone'],
    'fit and relation': Arm(FIT_AND_RELATION, knows_target=True),
}
BASELINES = ('bicubic', 'uniform')
COLUMNS = ('arm', 'seed', 'image', 'before', 'after', 'lr', 'replay', 'seconds')


@torch.no_grad()
def psnr(model: DRTLModel, net: nn.Module, lq: Tensor, gt: Tensor) -> float:
    """PSNR-Y of a restored image."""
    return score(net(lq[None].to(model.device) / 255).float().cpu(), gt, SCALE)[0]


def adapted(model: DRTLModel, pairs: list, lr: float, replay: float, steps: int) -> nn.Module:
    """The network, adapted to some pairs."""
    model.adapter.options = parse_section(AdaptOptions, {'lr': lr, 'replay': replay, 'steps': steps}, 'adapt')
    return last(model.adapter.course(model.trained_network(), model.weights, pairs, steps))


def compute(name: str, seed: int, steps: int, adaptation: int, root: Path) -> list[dict]:
    """Train, tune and adapt an arm: a row for each held-out image."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    began = time.perf_counter()
    support, val = (root / 'camera' / part for part in ('support', 'val'))
    target = {'dataroot_gt': str(support / 'gt'), 'dataroot_lq': str(support / 'lq'), 'num_shot': 5}
    model = DRTLModel(options_of(COMPARED[name], SCALE, root / 'auxiliary', target, steps, seed))
    model.prepare()
    train(model)
    pairs = list(model.target_pairs)
    held_out = [pairs[i] for i in HELD_OUT]
    others = [pair for i, pair in enumerate(pairs) if i not in HELD_OUT]

    def held_out_psnr(settings: tuple[float, float]) -> float:
        net = adapted(model, others, *settings, adaptation)
        return statistics.mean(psnr(model, net, *pair) for pair in held_out)

    lr, replay = max(itertools.product(RATES, REPLAYS), key=held_out_psnr)
    before, after = model.trained_network(), adapted(model, pairs, lr, replay, adaptation)
    seconds = round(time.perf_counter() - began)
    return [
        {
            **{'arm': name, 'seed': seed, 'image': image, 'lr': lr, 'replay': replay, 'seconds': seconds},
            **{'before': psnr(model, before, *pair), 'after': psnr(model, after, *pair)},
        }
        for image, pair in pairs_by_name(val / 'gt', val / 'lq').items()
    ]


def cell(name: str, seed: int) -> Path:
    """The file of an arm and a seed."""
    return RESULTS / f'{name.replace(" ", "_")}-{seed}.csv'


def kept() -> list[dict]:
    """The rows of all cells."""
    rows = []
    for path in sorted(RESULTS.glob('*.csv')):
        with open(path, newline='', encoding='utf-8') as file:
            rows += [
                {**row, 'before': float(row['before']), 'after': float(row['after'])} for row in csv.DictReader(file)
            ]
    return rows


def table(rows: list[dict]) -> str:
    """Means, and differences to the best baseline, paired by image and seed."""
    scores = {
        arm: {(row['seed'], row['image']): row for row in rows if row['arm'] == arm}
        for arm in COMPARED
        if any(row['arm'] == arm for row in rows)
    }

    def mean(arm: str, when: str) -> float:
        return statistics.mean(row[when] for row in scores[arm].values())

    baseline = max((arm for arm in BASELINES if arm in scores), key=lambda arm: mean(arm, 'after'), default=None)

    def difference(arm: str, when: str) -> str:
        if baseline is None or arm == baseline:
            return ''
        common = sorted(scores[arm].keys() & scores[baseline].keys())
        return interval([scores[arm][key][when] - scores[baseline][key][when] for key in common])

    body = []
    for arm in COMPARED:
        if arm not in scores:
            body.append([arm, 'not run', '', '', '', ''])
            continue
        seeds = len({seed for seed, _ in scores[arm]})
        psnrs = [f'{mean(arm, when):.2f}' for when in ('before', 'after')]
        body.append([arm, str(seeds), *psnrs, difference(arm, 'before'), difference(arm, 'after')])
    against = baseline or 'baseline'
    header = ['arm', 'seeds', 'before', 'after', f'before - {against}', f'after - {against}']
    return markdown_table(header, body)


def run(seed: int, steps: int, adaptation: int, names: Sequence[str]) -> Iterator[list[dict]]:
    """Compute arms in two processes, and print each when it is done; yields its rows."""
    with tempfile.TemporaryDirectory() as folder:
        root = prepare_sample_data(Path(folder, 'sample'))
        with ProcessPoolExecutor(2, get_context('spawn')) as pool:
            jobs = [pool.submit(compute, name, seed, steps, adaptation, root) for name in names]
            for job in as_completed(jobs):
                rows = job.result()
                before, after = (statistics.mean(row[when] for row in rows) for when in ('before', 'after'))
                print(f'{rows[0]["arm"]}: {before:.2f} -> {after:.2f} dB ({rows[0]["seconds"]} s)', flush=True)
                yield rows


def main() -> None:
    """Compute what is asked for, and print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--seed', type=int, default=0, help='the live seed; default: 0')
    arguments.add_argument(
        '--write', type=int, metavar='SEED', help='compute the missing cells of a seed and keep them'
    )
    arguments.add_argument('--report', action='store_true', help='compute nothing')
    arguments.add_argument('--steps', type=int, default=STEPS, help='training steps, to try the script quickly')
    arguments.add_argument('--adaptation', type=int, default=ADAPTATION, help='adaptation steps, likewise')
    args = arguments.parse_args()
    if args.write is not None:
        if (args.steps, args.adaptation) != (STEPS, ADAPTATION):
            sys.exit('--write keeps full results only; leave out --steps and --adaptation.')
        missing = [name for name in COMPARED if not cell(name, args.write).is_file()]
        for rows in run(args.write, STEPS, ADAPTATION, missing):
            write_rows(cell(rows[0]['arm'], args.write), COLUMNS, rows)
    elif not args.report:
        print(f'Seed {args.seed}, live, PSNR-Y before and after adaptation:')
        live = itertools.chain.from_iterable(run(args.seed, args.steps, args.adaptation, list(COMPARED)))
        print(f'\nThis seed:\n\n{table(list(live))}')
    print(f'\nCommitted seeds (intervals: 95 %, paired by image and seed):\n\n{table(kept())}')


if __name__ == '__main__':
    main()
