"""Published networks, adapted to real cameras: ``basicsr adapt`` against fine-tuning by hand.

    python benchmarks/published.py --train srvgg dncnn    # the two networks that are not published; needs a GPU
    python benchmarks/published.py                        # all cells that are missing; can be interrupted
    python benchmarks/published.py --report               # tables of the cells that are there

The protocol, fixed before the first table:

- Cases: BSRN x3 on City100's Nikon, BSRN x2 on its iPhone, SRVGGNetCompact x4 (16 convolutions of 64 features, trained
  on bicubic pairs) on the Nikon; at scale 1, DnCNN (10 convolutions of 64 features, trained on Gaussian noise) on
  PolyU's Canon 5D2 and Nikon D800.
- Regimes: ``pairs_5``, all five support pairs; ``pair_1``, one whole pair; ``crops_5``, a crop of 64² LQ pixels of
  each. Three draws: of the pair, of the crops, and of all seeds.
- Fine-tuning by hand (``by_hand_RATE``): Adam at each of RATES, L1, 16 patches of 24² LQ pixels a step, flipped and
  turned, up to 1000 steps; the network after each number of steps in STEPS. The *oracle* is the best rate and number of
  steps on ``val``, which no user has: the one use of ``val`` for a choice. ``averaged_RATE``: the weights of three
  such runs averaged, and the best of these on ``val``. ``early_stopping``: rate and steps are chosen on one held-out
  pair (of ``pair_1``, a quarter), then trained on all pairs.
- Ours: ``basicsr adapt`` with its defaults, which sees the support pairs only. Neither camera fit nor relation enters
  it, so there are no arms without them; the ablations are without augmentation, without average and without choice.
- Reported on ``val``: PSNR, SSIM and MS-SSIM on luma (scale 1: on RGB), NIQE. Fine-tuning by hand has PSNR after each
  number of steps, the others after the best one. Differences are paired by image, means of the draws, with a 95 %
  interval by Student's t over all images. Tables say how many draws there are.

A cell (case, regime, draw, arm) is one CSV in ``benchmarks/published``, with a row for each image and number of steps.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Before BasicSR: it imports drtl_plugin, which repairs BasicSR.
from common import HERE, interval, markdown_table, parse, parser, write_rows  # isort: skip
import bsrn_arch
import cv2
import numpy as np
import torch
import yaml
from basicsr.archs import build_network
from basicsr.metrics import calculate_niqe
from basicsr.metrics.psnr_ssim import calculate_psnr_pt, calculate_ssim_pt
from basicsr.utils import tensor2img
from basicsr.utils.color_util import rgb2ycbcr_pt
from basicsr.utils.matlab_functions import imresize
from basicsr.utils.registry import ARCH_REGISTRY
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

import drtl_plugin
from drtl_plugin.api import adapt_model
from drtl_plugin.api.adapt import adapt
from drtl_plugin.meta.adaptation import adaptation, blend, last
from drtl_plugin.models.cross_validation import folds_of, num_runs
from drtl_plugin.runtime.tiles import restore
from drtl_plugin.runtime.trained_network import TrainedNetwork, load_trained
from drtl_plugin.tasks.patches import paired_patches

RESULTS = HERE / 'published'
OWN_WEIGHTS = RESULTS / 'weights'
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
STEPS = (0, 50, 100, 200, 400, 600, 800, 1000)
BATCH, LQ_SIZE, CROP = 16, 24, 64
DRAWS = (0, 1, 2)
REGIMES = ('pairs_5', 'pair_1', 'crops_5')

Image = np.ndarray
Pairs = dict[str, tuple[Image, Image]]


@dataclass(frozen=True)
class Case:
    """A network and a camera.

    Attributes:
        folder (str): Folder of the camera's images.
        scale (int): Scale of the network.
        weights (str): File of its weights.
        network (dict): Its architecture, for networks that spandrel does not know.
    """

    folder: str
    scale: int
    weights: str
    network: dict | None = None


def _bsrn(scale: int) -> dict:
    return {'type': 'BSRN', 'num_feat': 64, 'num_block': 8, 'upscale': scale}


CASES = {
    'nikon_x3': Case('city100_nikon', 3, 'bsrn_x3.pth', _bsrn(3)),
    'iphone_x2': Case('city100_iphone', 2, 'bsrn_x2.pth', _bsrn(2)),
    'nikon_x4': Case('city100_nikon', 4, 'srvgg.pth'),
    'canon_x1': Case('polyu_canon5d2', 1, 'dncnn.pth'),
    'nikon_x1': Case('polyu_nikond800', 1, 'dncnn.pth'),
}


def pairs_of(data: Path, case: Case, part: str) -> Pairs:
    """GT and LQ by name, uint8, BGR."""
    folder = data / case.folder / part
    gt, lq = (folder / side for side in (('gt', 'lq') if case.scale == 1 else ('hr', f'lr_x{case.scale}')))
    return {path.stem: tuple(cv2.imread(str(side / path.name)) for side in (gt, lq)) for path in sorted(gt.iterdir())}


def support(data: Path, case: Case, regime: str, draw: int) -> Pairs:
    """The pairs of a regime."""
    pairs = pairs_of(data, case, 'support')
    if regime == 'pair_1':
        name = list(pairs)[draw]
        return {name: pairs[name]}
    if regime == 'crops_5':
        generator = np.random.default_rng(draw)
        for name, (gt, lq) in pairs.items():
            top, left = (int(generator.integers(extent - CROP + 1)) for extent in lq.shape[:2])
            s = case.scale
            pairs[name] = (
                gt[s * top : s * (top + CROP), s * left : s * (left + CROP)],
                lq[top : top + CROP, left : left + CROP],
            )
    return pairs


def tensors(pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
    """``(lq, gt)``, uint8, RGB, ``(3, H, W)``."""
    return [
        tuple(torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))) for image in (lq, gt))
        for gt, lq in pairs.values()
    ]


@dataclass(frozen=True, eq=False)
class Cell:
    """What an arm is given, and how it is judged.

    Attributes:
        case (Case): The case.
        network (TrainedNetwork): The network as published.
        pairs (Pairs): The support pairs.
        val (Pairs): The pairs to report on.
        draw (int): Seed of everything.
        weights (Path), option_file (str | None): The network's files.
    """

    case: Case
    network: TrainedNetwork
    pairs: Pairs
    val: Pairs
    draw: int
    weights: Path
    option_file: str | None

    def scores(self, net: nn.Module, only_psnr: bool = False) -> list[dict]:
        """A row for each image of ``val``."""
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        net = net.to(device).eval()
        scale = self.case.scale
        options = {'crop_border': scale, 'test_y_channel': scale > 1}
        rows = []
        for name, pair in self.val.items():
            lq, gt = (image[None].to(device) / 255 for image in tensors({name: pair})[0])
            restored = (restore(net, lq, scale, self.network.window, 512) * 255).round().clamp(0, 255) / 255
            row = {'image': name, 'psnr': calculate_psnr_pt(restored, gt, **options).item()}
            if not only_psnr:
                row['ssim'] = calculate_ssim_pt(restored, gt, **options).item()
                inner = [image[..., scale:-scale, scale:-scale] for image in (restored, gt)]
                images = [rgb2ycbcr_pt(image, y_only=True) if scale > 1 else image for image in inner]
                row['ms_ssim'] = multiscale_structural_similarity_index_measure(*images, data_range=1.0).item()
                row['niqe'] = float(calculate_niqe(tensor2img(restored), scale))
            rows.append(row)
        return rows


def course(cell: Cell, pairs: list[tuple[Tensor, Tensor]], rate: float, seed: int) -> Iterator[tuple[int, nn.Module]]:
    """Fine-tuning by hand: the network after each number of steps in STEPS."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    generator = torch.Generator().manual_seed(seed)
    batches = (
        tuple(images.to(device) for images in paired_patches(pairs, BATCH, LQ_SIZE, generator))
        for _ in range(STEPS[-1])
    )
    for step, net in enumerate(adaptation(cell.network.net.to(device), nn.L1Loss(), batches, rate)):
        if step in STEPS:
            yield step, net


def published(cell: Cell) -> Iterator[dict]:
    """The network as it is."""
    yield from ({'step': 0, **row} for row in cell.scores(cell.network.net))


def by_hand(rate: float, num_runs: int = 1) -> Callable[[Cell], Iterator[dict]]:
    """Fine-tuning at a rate; the weights of ``num_runs`` runs are averaged."""

    def arm(cell: Cell) -> Iterator[dict]:
        runs = [course(cell, tensors(cell.pairs), rate, 10 * cell.draw + run) for run in range(num_runs)]
        rows, best, highest = {}, None, -math.inf
        for together in zip(*runs, strict=True):
            step, nets = together[0][0], [net for _, net in together]
            net = blend(nets[0], nets, 1)
            rows[step] = cell.scores(net, only_psnr=True)
            psnr = statistics.mean(row['psnr'] for row in rows[step])
            if psnr > highest:
                best, highest = (step, net), psnr
        if best is not None:
            rows[best[0]] = cell.scores(best[1])
        for step, of_step in rows.items():
            yield from ({'step': step, 'kind': f'{rate:g}', **row} for row in of_step)

    return arm


def early_stopping(cell: Cell) -> Iterator[dict]:
    """Rate and steps are those that restore a held-out pair best; then all pairs are trained on."""
    pairs = tensors(cell.pairs)
    held_out, *others = [
        [(pairs[part.pair][0][(..., *part.region(1))], pairs[part.pair][1][(..., *part.region(cell.case.scale))])]
        for (part,) in folds_of([tuple(lq.shape[-2:]) for lq, _ in pairs], 5)
    ]
    lq, gt = paired_patches(held_out, 64, LQ_SIZE, torch.Generator().manual_seed(cell.draw))
    losses = {}
    for rate in RATES:
        for step, net in course(cell, [pair for fold in others for pair in fold], rate, cell.draw):
            device = next(net.parameters()).device
            with torch.no_grad():
                losses[rate, step] = nn.functional.mse_loss(net(lq.to(device)), gt.to(device)).item()
    finite = {key: loss for key, loss in losses.items() if math.isfinite(loss)}
    rate, steps = min(finite, key=lambda key: finite[key])
    for step, net in course(cell, pairs, rate, cell.draw):
        if step == steps:
            yield from ({'step': step, 'kind': f'{rate:g}', **row} for row in cell.scores(net))
            return


def ours(**changes) -> Callable[[Cell], Iterator[dict]]:
    """``basicsr adapt``, with changes to ``drtl.adapt`` for ablations."""

    def arm(cell: Cell) -> Iterator[dict]:
        original = adapt_model.adaptation_options

        def changed(*arguments):
            opt = original(*arguments)
            opt['manual_seed'] = cell.draw
            opt['drtl']['adapt'].update(changes)
            return opt

        with tempfile.TemporaryDirectory() as folder:
            for name, (gt, lq) in cell.pairs.items():
                for side, image in (('gt', gt), ('lq', lq)):
                    Path(folder, 'pairs', side).mkdir(parents=True, exist_ok=True)
                    cv2.imwrite(str(Path(folder, 'pairs', side, f'{name}.png')), image)
            adapt_model.adaptation_options = changed
            try:
                adapt(f'{folder}/pairs', str(cell.weights), f'{folder}/out', cell.option_file)
            finally:
                adapt_model.adaptation_options = original
            adapted = load_trained(f'{folder}/out/net_g_adapted_latest.pth')
        chosen = adapted.adaptation or {}
        kind = f'{chosen["lr"]:g} {chosen["share"]:g}'
        steps = chosen['steps'] * num_runs(3, chosen['folds'])
        yield from ({'step': steps, 'kind': kind, **row} for row in cell.scores(adapted.net))

    return arm


ARMS: dict[str, Callable[[Cell], Iterator[dict]]] = {
    'published': published,
    **{f'by_hand_{rate:g}': by_hand(rate) for rate in RATES},
    **{f'averaged_{rate:g}': by_hand(rate, num_runs=3) for rate in RATES},
    'early_stopping': early_stopping,
    'ours': ours(),
    'ours_without_augmentation': ours(mixup=0, rgb_permutation=0),
    'ours_in_one_fold': ours(folds=2),
}
COLUMNS = ('step', 'kind', 'image', 'psnr', 'ssim', 'ms_ssim', 'niqe', 'seconds')


def measure(data: Path, case_name: str, regime: str, draw: int, arm: str) -> None:
    """Compute a cell, unless it is there."""
    path = RESULTS / f'{case_name}-{regime}-{draw}-{arm}.csv'
    if path.is_file():
        return
    case = CASES[case_name]
    weights = next((w for w in (data / 'weights' / case.weights, OWN_WEIGHTS / case.weights) if w.is_file()), None)
    if weights is None:
        print(f'{path.stem}: not run; there are no weights {case.weights}.')
        return
    with tempfile.TemporaryDirectory() as folder:
        option_file = None
        if case.network is not None:
            option_file = f'{folder}/network.yml'
            Path(option_file).write_text(yaml.safe_dump({'network_g': case.network, 'scale': case.scale}))
        network = load_trained(str(weights), option_file)
        pairs, val = support(data, case, regime, draw), pairs_of(data, case, 'val')
        cell = Cell(case, network, pairs, val, draw, weights, option_file)
        began = time.monotonic()
        rows = list(ARMS[arm](cell))
        seconds = round(time.monotonic() - began, 1)
    write_rows(path, COLUMNS, ({**row, 'seconds': seconds} for row in rows))
    print(f'{path.stem}: {statistics.mean(row["psnr"] for row in rows[-len(val) :]):.2f} dB, {seconds} s')


def read_cells() -> dict[tuple[str, str, int, str], list[dict]]:
    """All cells that are there."""
    cells = {}
    for path in sorted(RESULTS.glob('*.csv')):
        case, regime, draw, arm = path.stem.split('-', 3)
        with open(path, newline='', encoding='utf-8') as file:
            cells[case, regime, int(draw), arm] = list(csv.DictReader(file))
    return cells


def best_on_val(cells: dict, case: str, regime: str, draw: int, arm: str) -> list[dict] | None:
    """Rows of the rate and number of steps that are best on ``val``, in PSNR: the oracle."""
    candidates = defaultdict(list)
    for rate in RATES:
        rows = cells.get((case, regime, draw, f'{arm}_{rate:g}'))
        if rows is None:
            return None
        for row in rows:
            candidates[rate, row['step']].append(row)
    return max(candidates.values(), key=lambda rows: statistics.mean(float(row['psnr']) for row in rows))


def by_draw(cells: dict, case: str, regime: str, arm: str) -> dict[int, list[dict]]:
    """Rows, one for each image, for each draw that is there."""
    draws = {}
    for draw in DRAWS:
        if arm in ('by_hand', 'averaged'):
            rows = best_on_val(cells, case, regime, draw, arm)
        else:
            rows = cells.get((case, regime, draw, arm))
        if rows is not None:
            draws[draw] = rows
    return draws


def mean_of(draws: dict[int, list[dict]], metric: str) -> float:
    """Mean of a metric over images and draws."""
    return statistics.mean(float(row[metric]) for rows in draws.values() for row in rows)


def relative_time(cells: dict, case: str, regime: str) -> str:
    """Seconds of ``basicsr adapt`` in relation to those of fine-tuning by hand at all rates."""
    ratios = []
    for draw in DRAWS:
        runs = [cells.get((case, regime, draw, arm)) for arm in ('ours', *(f'by_hand_{rate:g}' for rate in RATES))]
        if all(runs):
            own, *by_hand = (float(rows[0]['seconds']) for rows in runs)
            ratios.append(own / sum(by_hand))
    return f'{statistics.mean(ratios):.2f}' if ratios else 'not run'


def report() -> str:
    """Tables of PSNR and its differences to the oracle, and of the other metrics."""
    cells = read_cells()
    arms = {
        'as published': 'published',
        'by hand, oracle': 'by_hand',
        'by hand, averaged, oracle': 'averaged',
        'by hand, early stopping': 'early_stopping',
        '`basicsr adapt`': 'ours',
        'without augmentation': 'ours_without_augmentation',
        'in two folds': 'ours_in_one_fold',
    }
    rows, other_rows, all_differences = [], [], []
    for case in CASES:
        for regime in REGIMES:
            found = {name: by_draw(cells, case, regime, arm) for name, arm in arms.items()}
            row = [case, regime]
            for draws in found.values():
                row.append(f'{mean_of(draws, "psnr"):.2f} ({len(draws)})' if draws else 'not run')
            oracle, own = found['by hand, oracle'], found['`basicsr adapt`']
            difference = 'not run'
            common = sorted(oracle.keys() & own.keys())
            if common:
                images = zip(*(zip(own[draw], oracle[draw], strict=True) for draw in common), strict=True)
                differences = [
                    statistics.mean(float(ours['psnr']) - float(theirs['psnr']) for ours, theirs in image)
                    for image in images
                ]
                all_differences += differences
                difference = interval(differences)
                for metric in ('ssim', 'ms_ssim', 'niqe'):
                    three = (found['as published'], oracle, own)
                    values = [f'{mean_of({draw: draws[draw] for draw in common}, metric):.4f}' for draws in three]
                    other_rows.append([case, regime, metric, *values])
            rows.append([*row, difference, relative_time(cells, case, regime)])
    table = markdown_table(['case', 'pairs', *arms, 'adapt - oracle', 'time, adapt : by hand'], rows)
    table += '\n\nPSNR in dB; in brackets, the number of draws.'
    if all_differences:
        table += f' adapt - oracle over all cases and images: {interval(all_differences)} dB.'
        header = ['case', 'pairs', 'metric', 'as published', 'by hand, oracle', '`basicsr adapt`']
        table += '\n\n' + markdown_table(header, other_rows)
    return table


def draw_curves(cells: dict, data: Path, path: Path) -> None:
    """Draw PSNR against the number of LQ pixels, and against steps for five pairs, of the cases that have cells."""
    cases = [name for name in CASES if any(case == name and arm == 'ours' for case, _, _, arm in cells)]
    figure = Figure(figsize=(5 * len(cases), 7), layout='constrained')
    axes = figure.subplots(2, len(cases), squeeze=False)
    for column, name in enumerate(cases):
        above, below = axes[:, column]
        curves = defaultdict(list)
        for regime in REGIMES:
            pixels = sum(lq.shape[0] * lq.shape[1] for _, lq in support(data, CASES[name], regime, 0).values())
            for label, arm in (('as published', 'published'), ('by hand, oracle', 'by_hand'), ('adapt', 'ours')):
                draws = by_draw(cells, name, regime, arm)
                if draws:
                    curves[label].append((pixels, mean_of(draws, 'psnr')))
        for label, points in curves.items():
            above.plot(*zip(*sorted(points), strict=True), marker='o', label=label)
        above.set(title=name, xscale='log', xlabel='LQ pixels: five crops, one pair, five pairs', ylabel='PSNR, dB')
        above.set_xticks([pixels for pixels, _ in points], [f'{pixels:,}' for pixels, _ in points])
        above.minorticks_off()
        above.legend()
        for rate in RATES:
            steps = defaultdict(list)
            for draw in DRAWS:
                for row in cells.get((name, 'pairs_5', draw, f'by_hand_{rate:g}'), []):
                    steps[int(row['step'])].append(float(row['psnr']))
            if steps:
                below.plot(
                    list(steps), [statistics.mean(values) for values in steps.values()], label=f'by hand, {rate:g}'
                )
        own = by_draw(cells, name, 'pairs_5', 'ours')
        if own:
            (steps_of_own,) = {int(row['step']) for rows in own.values() for row in rows}
            below.plot([steps_of_own], [mean_of(own, 'psnr')], 'k*', markersize=10, label='adapt, all its steps')
        below.set(xlabel='steps of 16 patches, five pairs', ylabel='PSNR, dB')
        below.set_ylim(bottom=above.get_ylim()[0])
        below.legend()
    figure.savefig(path, dpi=80)


def train_own(name: str, data: Path) -> None:
    """Train a network that is not published, on BSDS500 with L1 at a rate that falls to 0.

    Raises:
        RuntimeError: If it ends up no better than its enlarged input. (At 1e-3, SRVGGNetCompact once collapsed.)
    """
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    scale = 4 if name == 'srvgg' else 1
    photographs = [cv2.imread(str(path)) for path in sorted((data / 'bsds500_train').iterdir())]
    photographs = [image[: image.shape[0] // 4 * 4, : image.shape[1] // 4 * 4] for image in photographs]
    reduced = [imresize(image / 255, 1 / scale) * 255 if scale > 1 else image for image in photographs]
    pairs = tensors(
        {
            str(i): (gt, np.uint8(lq.round().clip(0, 255)))
            for i, (gt, lq) in enumerate(zip(photographs, reduced, strict=True))
        }
    )
    if name == 'srvgg':
        net = build_network({'type': 'SRVGGNetCompact', 'num_feat': 64, 'num_conv': 16, 'upscale': 4})
        num_steps, lr = 20_000, 3e-4
    else:
        from spandrel.architectures.DnCNN import DnCNN

        net, num_steps, lr = DnCNN(in_nc=3, out_nc=3, nc=64, nb=10, act_mode='R'), 10_000, 1e-3
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(num_steps):
            lq, gt = paired_patches(pairs, BATCH, 2 * LQ_SIZE, generator)
            if scale == 1:
                sigma = torch.rand(BATCH, 1, 1, 1, generator=generator) * 50 / 255
                lq = lq + sigma * torch.randn(lq.shape, generator=generator)
            yield lq.to(device), gt.to(device)

    torch.manual_seed(0)
    course = adaptation(net.to(device), nn.L1Loss(), batches(), lr, warmup=200, decay_steps=num_steps)
    trained = last(course)
    with torch.no_grad():
        lq, gt = next(batches())
        enlarged = nn.functional.interpolate(lq, scale_factor=scale, mode='bicubic') if scale > 1 else lq
        if not (trained(lq) - gt).square().mean() < (enlarged - gt).square().mean():
            raise RuntimeError(f'{name}: training has failed; run it again.')
    OWN_WEIGHTS.mkdir(parents=True, exist_ok=True)
    torch.save({'params': trained.cpu().half().state_dict()}, OWN_WEIGHTS / f'{name}.pth')


def main() -> None:
    """Measure the missing cells, or report."""
    arguments = parser(__doc__)
    arguments.add_argument('--report', action='store_true', help='only print the tables')
    arguments.add_argument('--train', nargs='+', choices=['srvgg', 'dncnn'], default=[], help='train these networks')
    arguments.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), help='default: all')
    arguments.add_argument('--regimes', nargs='+', choices=REGIMES, default=list(REGIMES), help='default: all')
    arguments.add_argument('--draws', nargs='+', type=int, choices=DRAWS, default=list(DRAWS), help='default: all')
    arguments.add_argument('--arms', nargs='+', choices=ARMS, default=list(ARMS), help='default: all')
    args: argparse.Namespace = parse(arguments)
    drtl_plugin.register()
    assert bsrn_arch.BSRN.__name__ in ARCH_REGISTRY
    for name in args.train:
        train_own(name, args.data)
    if not args.report and not args.train:
        for draw in args.draws:
            for regime in args.regimes:
                for case in args.cases:
                    for arm in args.arms:
                        measure(args.data, case, regime, draw, arm)
    if not args.train:
        print(report())
        draw_curves(read_cells(), args.data, HERE.parent / 'docs/published.png')


if __name__ == '__main__':
    main()
