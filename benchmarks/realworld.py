"""Few-shot super-resolution of real cameras: DRTL and its baselines at equal numbers of gradient evaluations.

Networks are adapted to City100's cameras on 1, 2 or 5 pairs of `support` and evaluated on `val`: PSNR and SSIM on luma
after 0 to 1000 adaptation steps. Auxiliary photographs are from BSDS500. Every arm is a run of DRTLModel with the
options in ARMS, and all arms use the same number of gradient evaluations (one patch, forward and backward), including
those that measure the relation. Results are kept in benchmarks/results/realworld, so that a run can be interrupted;
remove that folder to measure changed code.

    python benchmarks/realworld.py --quick             # one seed, five pairs, main arms: 10 minutes on 2 CPU cores
    python benchmarks/realworld.py                     # everything: about 9 hours, more with the paper arms
    python benchmarks/realworld.py --report            # tables and pictures of existing results

Writes table.csv, table.md, curves_*.png and crops.png to that folder. Uses a GPU if there is one.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import msgspec
from common import HERE, LQ_SIZE, markdown_table, parse, parser, read_pairs

import torch  # isort: skip
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from tqdm import tqdm

from drtl_plugin.meta.adaptation import last
from drtl_plugin.models import DRTLModel
from drtl_plugin.options.convert import parse_section
from drtl_plugin.options.file import load_option_file
from drtl_plugin.options.sections import AdaptOptions, DRTLOptions

# The last one was used to choose options, and is not reported unless asked for.
TRACKS = {
    'nikon_x4': ('city100_nikon', 4),
    'nikon_x3': ('city100_nikon', 3),
    'iphone_x2': ('city100_iphone', 2),
    'iphone_x4': ('city100_iphone', 4),
}
DEVELOPMENT = 'iphone_x4'
EPISODES, PATCHES = 4, 4  # tasks a step, and patches of each

UNIFORM = {'relation': 'uniform'}
TRANSFER = {'relation': 'transfer', 'mode': 'sampling'}
PREDICTED = {'relation': 'predicted_transfer', 'mode': 'sampling'}
# Baselines use neither replay nor the warm-up, which slows them down.
PLAIN, HIGH_RATE = ({'warmup': 0, 'replay': 0, 'lr': lr} for lr in (1e-4, 1e-3))
NO_REPLAY = {'replay': 0}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train the network, and ways to adapt it afterwards.

    Attributes:
        drtl (dict): Section ``drtl`` of the option file.
        adapt (dict): Options of ``drtl.adapt`` by name of the variant.
        distortions (str | list[dict]): Option ``datasets.train.distortions``.
        knows_target (bool): Whether training uses the support pairs, and so is repeated for each number of them.
        trained (bool): Whether the network is trained before adaptation.
        network_r (dict | None): Section ``network_r`` of the option file.
    """

    drtl: dict
    adapt: dict = dataclasses.field(default_factory=lambda: {'': PLAIN})
    distortions: object = 'default'
    knows_target: bool = False
    trained: bool = True
    network_r: dict | None = None


def drtl_arm(drtl: dict, **adapt: dict) -> Arm:
    return Arm(drtl, {'': {}, **adapt}, knows_target=True)


def paper_arm(pipeline: str) -> Arm:
    """The paper's system, with the settings of its option file except the schedules."""
    opt = load_option_file(str(HERE.parent / 'options' / f'drtl_paper_{pipeline}_x4.yml'))
    drtl = {key: value for key, value in opt['drtl'].items() if key != 'adapt'}
    adapt = {'': NO_REPLAY, 'high_rate': {**NO_REPLAY, 'lr': 1e-3}}
    return Arm(drtl, adapt, knows_target=True, network_r=opt['network_r'])


BASELINES = {
    'scratch': Arm({'weighting': UNIFORM}, {'': HIGH_RATE}, trained=False),
    'bicubic': Arm(
        {'pipeline': 'pretrain', 'weighting': UNIFORM},
        {'': PLAIN, 'high_rate': HIGH_RATE},
        distortions=[{'name': 'bicubic'}],
    ),
    'uniform': Arm({'pipeline': 'pretrain', 'weighting': UNIFORM}),
    'uniform meta': Arm({'pipeline': 'meta', 'weighting': UNIFORM}),
}
PAPER = {'paper pretrain': paper_arm('pretrain'), 'paper meta': paper_arm('meta')}
FIT = {'camera_fit': True}
ARMS = {
    **BASELINES,
    **PAPER,
    'DRTL weights': drtl_arm({'pipeline': 'pretrain', 'weighting': TRANSFER}, no_replay=NO_REPLAY),
    'DRTL predicted weights': drtl_arm({'pipeline': 'pretrain', 'weighting': PREDICTED}, no_replay=NO_REPLAY),
    'DRTL weights meta': drtl_arm({'pipeline': 'meta', 'weighting': TRANSFER}, no_replay=NO_REPLAY),
    'fit alone': drtl_arm(
        {'pipeline': 'pretrain', **FIT, 'weighting': {**UNIFORM, 'mode': 'sampling', 'fit_share': 1}},
        no_replay=NO_REPLAY,
    ),
    'fit half': drtl_arm(
        {'pipeline': 'pretrain', **FIT, 'weighting': {**UNIFORM, 'mode': 'sampling', 'fit_share': 0.5}},
        no_replay=NO_REPLAY,
    ),
    'DRTL': drtl_arm(
        {'pipeline': 'pretrain', **FIT, 'weighting': TRANSFER},
        no_replay=NO_REPLAY,
        high_rate={'lr': 1e-3},
    ),
    'DRTL meta': drtl_arm({'pipeline': 'meta', **FIT, 'weighting': TRANSFER}, no_replay=NO_REPLAY),
}
DEFAULT = 'DRTL'
RESULTS = HERE / 'results'
FULL = {
    'arms': list(ARMS),
    'shots': [5, 1, 2],
    'seeds': 3,
    'iterations': 2000,
    'columns': (0, 1, 10, 50, 200, 1000),
    'results': RESULTS / 'realworld',
}
QUICK = {
    'arms': ['bicubic', 'uniform', DEFAULT],
    'shots': [5],
    'seeds': 1,
    'iterations': 600,
    'columns': (0, 1, 10, 50, 200),
    'results': RESULTS / 'realworld_quick',
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One training and its adaptations."""

    data: Path
    results: Path
    track: str
    arm: str
    shots: int
    seed: int
    iterations: int
    columns: tuple[int, ...]
    variants: tuple[str, ...]

    @property
    def trained_for(self) -> int:
        """Number of support pairs that training depends on, or 0."""
        return self.shots if ARMS[self.arm].knows_target else 0

    def path(self, variant: str) -> Path:
        """File of the result of an adaptation."""
        section = parse_section(AdaptOptions, ARMS[self.arm].adapt[variant], 'adapt')
        digest = _digest(options(self), msgspec.to_builtins(section), self.columns)
        name = '_'.join([self.arm, *([variant] if variant else [])]).replace(' ', '_')
        return self.results / self.track / f'{name}_k{self.shots}_s{self.seed}_{digest}.json'

    @property
    def network(self) -> Path:
        """File of the trained network, shared by adaptations."""
        opt = options(self)
        if not self.trained_for:
            del opt['datasets']['train']['target']
        name = f'{self.arm.replace(" ", "_")}_k{self.trained_for}_s{self.seed}_{_digest(opt)}.pth'
        return self.results / self.track / name

    @property
    def fit(self) -> Path:
        """File of the fitted camera, shared by arms."""
        digest = _digest(options(dataclasses.replace(self, arm='fit alone')))
        return self.results / self.track / f'fit_k{self.shots}_s{self.seed}_{digest}.pth'

    def missing(self) -> list[str]:
        """Variants without a result."""
        return [variant for variant in self.variants if not self.path(variant).is_file()]


def _digest(opt: dict, *settings: object) -> str:
    """Digest for file names, which changes with the options and with the defaults of the plug-in."""
    drtl = msgspec.to_builtins(DRTLOptions.from_opt(opt))
    del drtl['adapt']  # does not affect training
    return hashlib.sha256(json.dumps([{**opt, 'drtl': drtl}, *settings], sort_keys=True).encode()).hexdigest()[:8]


def options(job: Job) -> dict:
    """The parsed option file of a job."""
    camera, scale = TRACKS[job.track]
    target = {
        'dataroot_gt': str(job.data / camera / 'support' / 'hr'),
        'dataroot_lq': str(job.data / camera / 'support' / f'lr_x{scale}'),
        'num_shot': job.shots,
        'seed': job.seed,
    }
    return options_of(ARMS[job.arm], scale, job.data / 'bsds500_train', target, job.iterations, job.seed)


def options_of(arm: Arm, scale: int, auxiliary: Path, target: dict | None, budget: int, seed: int) -> dict:
    """The parsed option file of an arm.

    Args:
        arm (Arm): The arm.
        scale (int): Scale.
        auxiliary (Path): Folder of GT images for the auxiliary tasks.
        target (dict | None): ``datasets.train.target``.
        budget (int): Training steps, including those that measure the relation.
        seed (int): Seed.
    """
    iterations, relation = budget, arm.drtl['weighting']['relation']
    # `embedding` is measured before training, without gradients of net_g; the DRN's own training is not counted.
    hooks = copy.deepcopy(arm.drtl.get('hooks', []))
    if relation == 'transfer':
        # Measured once, before half of the training; steps on 8 patches of each task count as training does.
        steps, num_tasks = 10, 17 + arm.drtl.get('camera_fit', False)
        iterations -= num_tasks * steps * 8 // (EPISODES * PATCHES)
        hooks = [{'type': 'RelationHook', 'interval': int(budget * 0.46), 'transfer_steps': steps}]
    train = {
        'name': 'auxiliary tasks',
        'type': 'DistortionTaskDataset',
        'dataroot_gt': str(auxiliary),
        'gt_size': LQ_SIZE * scale,
        'num_support': PATCHES // 2,
        'num_query': PATCHES // 2,
        'distortions': arm.distortions,
        'seed': seed,
        'scale': scale,
        'target': target,
    }
    return {
        **({'network_r': copy.deepcopy(arm.network_r)} if arm.network_r else {}),
        'name': 'realworld',
        'model_type': 'DRTLModel',
        'scale': scale,
        'num_gpu': int(torch.cuda.is_available()),
        'manual_seed': seed,
        'is_train': True,
        'dist': False,
        'datasets': {'train': train},
        'network_g': {
            **{'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 32, 'num_block': 4},
            **{'upscale': scale, 'res_scale': 1},
        },
        'drtl': {'camera_fit': False, **copy.deepcopy(arm.drtl), 'hooks': hooks},
        'path': {},
        'train': {
            'amp': 'bf16',
            'ema_decay': 0.99,
            'optim_g': {'type': 'Adam', 'lr': 1e-3, 'betas': [0.9, 0.99]},
            'scheduler': {
                **{'type': 'CosineAnnealingRestartLR', 'periods': [max(iterations, 1)]},
                **{'restart_weights': [1], 'eta_min': 1e-6},
            },
            'total_iter': iterations,
            'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
        },
    }


def trained_model(job: Job) -> tuple[DRTLModel, float]:
    """The trained model of a job, from a file if there is one, and the training time in seconds."""
    torch.manual_seed(job.seed)
    opt = options(job)
    if job.fit.is_file() and opt['drtl']['camera_fit']:
        opt['path']['pretrain_camera_fit'] = str(job.fit)
    model = DRTLModel(opt)
    model.prepare()
    if model.camera_fit is not None and not job.fit.is_file():
        _write(job.fit, functools.partial(torch.save, model.camera_fit.state()))
    if not ARMS[job.arm].trained:
        return model, 0.0
    if job.network.is_file():
        state = torch.load(job.network, map_location=model.device, weights_only=True)
        model.net_g.load_state_dict(state['params'])
        model.net_g_ema.load_state_dict(state['params'])
        model.weights = state['weights']
        return model, state['seconds']
    seconds = train(model)
    state = {'params': model.net_g_ema.state_dict(), 'weights': model.weights, 'seconds': seconds}
    _write(job.network, functools.partial(torch.save, state))
    return model, seconds


def train(model: DRTLModel, episodes: int = EPISODES) -> float:
    """Train a model as its options say, on a number of episodes a step; returns seconds."""
    start = time.perf_counter()
    # The records go to an experiment's folder, which there is none of.
    model.hooks = [hook for hook in model.hooks if type(hook).__name__ == 'RelationHook']
    with tempfile.TemporaryDirectory() as folder:
        model.opt['path']['models'] = folder  # RelationHook saves the DRN there
        for iteration in range(1, model.opt['train']['total_iter'] + 1):
            model.update_learning_rate(iteration)
            indices = range((iteration - 1) * episodes, iteration * episodes)
            model.feed_data(default_collate([model.train_set[index] for index in indices]))
            model.optimize_parameters(iteration)
    return time.perf_counter() - start


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Save atomically, since several processes may work on the same job."""
    unfinished = path.with_suffix(f'.{os.getpid()}')
    save(unfinished)
    os.replace(unfinished, path)


@torch.no_grad()
def restore(model: DRTLModel, net: nn.Module, lq: Tensor) -> Tensor:
    """Restore an image ``(3, h, w)``, uint8, to ``(1, 3, s h, s w)`` on the CPU."""
    with model.precision():
        return net(lq[None].to(model.device) / 255).float().cpu()


def score(result: Tensor, gt: Tensor, scale: int) -> tuple[float, float]:
    """PSNR (dB) and SSIM on luma, without a border of ``scale`` pixels."""
    images = [tensor2img(image) for image in (result, gt[None] / 255)]
    return tuple(
        float(metric(*images, crop_border=scale, test_y_channel=True)) for metric in (calculate_psnr, calculate_ssim)
    )


def evaluate(model: DRTLModel, net: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Mean PSNR and SSIM over pairs."""
    scores = [score(restore(model, net, lq), gt, model.library.scale) for lq, gt in pairs]
    return [statistics.mean(values) for values in zip(*scores, strict=True)]


def adapt(model: DRTLModel, variant: dict, columns: tuple[int, ...], pairs: list) -> dict:
    """Scores by number of adaptation steps."""
    section = parse_section(AdaptOptions, {**variant, 'steps': columns[-1]}, 'adapt')
    model.adapter.options = section
    scores = {}
    course = model.adapter.course(model.trained_network(), model.weights, model.target_pairs, columns[-1])
    for step, net in enumerate(course):
        if step in columns:
            scores[step] = evaluate(model, net, pairs)
    return scores


def run(job: Job) -> str:
    """Run the missing parts of a job; returns a line of results."""
    start = time.perf_counter()
    camera, scale = TRACKS[job.track]
    job.network.parent.mkdir(parents=True, exist_ok=True)
    val = read_pairs(job.data / camera / 'val', scale)
    model, training_seconds = trained_model(job)
    said = []
    for variant in job.missing():
        began = time.perf_counter()
        scores = adapt(model, ARMS[job.arm].adapt[variant], job.columns, val)
        result = {
            'scores': scores,
            'training_seconds': training_seconds,
            'adaptation_seconds': time.perf_counter() - began,
        }
        job.path(variant).write_text(json.dumps(result), encoding='utf-8')
        said.append(f'{variant or "plain"}: ' + ' '.join(f'{value[0]:.2f}' for value in scores.values()))
    head = f'{job.track} {job.arm} K={job.shots} seed {job.seed} ({time.perf_counter() - start:.0f} s)'
    return f'{head} {"; ".join(said)}'


def upsampling(args: argparse.Namespace, track: str) -> list[float]:
    """PSNR and SSIM of bicubic upsampling."""
    camera, scale = TRACKS[track]
    path = args.results / track / 'bicubic_upsampling.json'
    if not path.is_file():
        scores = []
        for lq, gt in read_pairs(args.data / camera / 'val', scale):
            result = F.interpolate(lq[None] / 255, size=gt.shape[-2:], mode='bicubic', antialias=True)
            scores.append(score(result, gt, scale))
        path.write_text(json.dumps([statistics.mean(values) for values in zip(*scores, strict=True)]), encoding='utf-8')
    return json.loads(path.read_text(encoding='utf-8'))


def collect(args: argparse.Namespace) -> list[dict]:
    """Existing results: a row for each track, arm, number of shots, seed and number of steps."""
    rows = []
    for job in all_jobs(args):
        for variant in job.variants:
            path = job.path(variant)
            if not path.is_file():
                continue
            result = json.loads(path.read_text(encoding='utf-8'))
            name = f'{job.arm}, {variant.replace("_", " ")}' if variant else job.arm
            for step, (psnr, ssim) in result['scores'].items():
                rows.append(
                    {
                        **{'track': job.track, 'arm': name, 'shots': job.shots, 'seed': job.seed, 'steps': int(step)},
                        **{'psnr_y': psnr, 'ssim_y': ssim},
                        **{key: result[key] for key in ('training_seconds', 'adaptation_seconds')},
                    }
                )
    return rows


Means = dict[tuple[str, int, str, int], tuple[float, float]]


def means_of(rows: list[dict], metric: str) -> Means:
    """Mean and standard deviation over seeds, by track, shots, arm and steps."""
    values = defaultdict(list)
    for row in rows:
        values[row['track'], row['shots'], row['arm'], row['steps']].append(row[metric])
    return {
        key: (statistics.mean(some), statistics.stdev(some) if len(some) > 1 else 0.0) for key, some in values.items()
    }


def tables(args: argparse.Namespace, rows: list[dict]) -> str:
    """Markdown: a table for each track and number of shots."""
    psnr, ssim = means_of(rows, 'psnr_y'), means_of(rows, 'ssim_y')
    seconds = means_of([{**row, 'steps': 0} for row in rows], 'training_seconds')
    text = []
    arms = list(dict.fromkeys(row['arm'] for row in rows))
    for track in args.tracks:
        for shots in args.shots:
            present = [arm for arm in arms if (track, shots, arm, 0) in psnr]
            if not present:
                continue
            upsampled = upsampling(args, track)
            text.append(
                f'### {track}, {shots} shot{"s" * (shots > 1)} (bicubic upsampling: {upsampled[0]:.2f} dB, '
                f'{upsampled[1]:.4f})\n'
            )
            for means, form in ((psnr, '{:.2f} ± {:.2f}'), (ssim, '{:.4f} ± {:.4f}')):
                body = [
                    [
                        arm,
                        *(form.format(*means[track, shots, arm, step]) for step in args.columns),
                        f'{seconds[track, shots, arm, 0][0]:.0f}',
                    ]
                    for arm in present
                ]
                name = 'PSNR-Y, dB' if means is psnr else 'SSIM-Y'
                header = [name, *(f'{step} steps' for step in args.columns), 'training, s']
                text.append(markdown_table(header, body) + '\n')
    return '\n'.join(text)


def verdict(args: argparse.Namespace, rows: list[dict]) -> str:
    """Markdown: gain of the default arm over the best baseline, in dB."""
    psnr = means_of(rows, 'psnr_y')
    arms = {row['arm'] for row in rows}
    baselines = {arm for arm in arms if arm.partition(',')[0] in BASELINES}
    ours = {arm for arm in arms - baselines if arm.partition(',')[0] not in PAPER}
    final = args.columns[-1]

    def best(track: str, shots: int, step: int, arms: Iterable[str]) -> float:
        found = [psnr[track, shots, arm, step][0] for arm in arms if (track, shots, arm, step) in psnr]
        return max(found, default=float('nan'))

    body = []
    for shots in args.shots:
        margins = []
        for track in args.tracks:
            baseline = {step: best(track, shots, step, baselines) for step in args.columns}
            default = {step: best(track, shots, step, [DEFAULT]) for step in args.columns}
            margin = [default[step] - baseline[step] for step in (0, 10, final)]
            margin += [default[50] - baseline[final], best(track, shots, final, ours) - baseline[final]]
            margins.append(margin)
            body.append([track, str(shots), *(f'{value:+.2f}' for value in margin)])
        body.append(['mean', str(shots), *(f'{statistics.mean(column):+.2f}' for column in zip(*margins, strict=True))])
    header = ['track', 'shots', 'before adaptation', 'after 10 steps', f'after {final}']
    return markdown_table([*header, f'50 steps against {final}', f'best of ours after {final}'], body)


def draw_curves(args: argparse.Namespace, rows: list[dict]) -> None:
    """curves_kN.png: PSNR against adaptation steps, with bands of one standard deviation."""
    from matplotlib.figure import Figure

    psnr = means_of(rows, 'psnr_y')
    for shots in args.shots:
        figure = Figure(figsize=(4.6 * len(args.tracks), 4.2), layout='constrained')
        for axes, track in zip(figure.subplots(1, len(args.tracks), squeeze=False)[0], args.tracks, strict=True):
            # Besides the plain arms, the strongest baseline.
            for arm in (*ARMS, 'bicubic, high rate'):
                if (track, shots, arm, 0) not in psnr or arm == 'scratch':  # far below
                    continue
                mean, spread = zip(*(psnr[track, shots, arm, step] for step in args.columns), strict=True)
                style = '--' if arm.partition(',')[0] in BASELINES else '-'
                line = axes.plot(args.columns, mean, style, marker='.', label=arm)[0]
                low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
                axes.fill_between(args.columns, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            axes.set_xscale('symlog', linthresh=1)
            axes.set_title(f'{track}, {shots} shot{"s" * (shots > 1)}')
            axes.set_xlabel('steps of adaptation')
            axes.set_ylabel('PSNR-Y, dB')
            axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(args.results / f'curves_k{shots}.png', dpi=100)


def draw_crops(args: argparse.Namespace) -> None:
    """crops.png: for each track, the most detailed part of a held-out photograph; five shots, first seed."""
    from matplotlib.figure import Figure

    side, steps = 96, 200 if 200 in args.columns else args.columns[-1]
    jobs = [
        Job(args.data, args.results, track, DEFAULT, max(args.shots), 0, args.iterations, args.columns, ())
        for track in args.tracks
    ]
    jobs = [job for job in jobs if job.network.is_file()]
    if not jobs:
        return
    figure = Figure(figsize=(10, 2.7 * len(jobs)), layout='constrained')
    for line, job in zip(figure.subplots(len(jobs), 4, squeeze=False), jobs, strict=True):
        track = job.track
        camera, scale = TRACKS[track]
        model, _ = trained_model(job)
        model.adapter.options = parse_section(AdaptOptions, {'steps': steps}, 'adapt')
        course = model.adapter.course(model.trained_network(), model.weights, model.target_pairs, steps)
        adapted = last(course)
        lq, gt = read_pairs(args.data / camera / 'val', scale)[0]
        brightness = gt.float().mean(dim=0, keepdim=True)[None] / 255
        spread = F.avg_pool2d(brightness**2, side, 12) - F.avg_pool2d(brightness, side, 12) ** 2
        top, left = (12 * int(i) for i in divmod(spread.argmax().item(), spread.shape[-1]))
        pictures = {
            'bicubic': F.interpolate(lq[None] / 255, size=gt.shape[-2:], mode='bicubic', antialias=True),
            'before adaptation': restore(model, model.net_g_ema, lq),
            f'after {steps} steps': restore(model, adapted, lq),
            'ground truth': gt[None] / 255,
        }
        for axes, (name, picture) in zip(line, pictures.items(), strict=True):
            axes.imshow(tensor2img(picture, rgb2bgr=False)[top : top + side, left : left + side])
            axes.set_title(f'{track}: {name}' if name == 'bicubic' else name, fontsize=9)
            axes.axis('off')
    figure.savefig(args.results / 'crops.png', dpi=110)


def report(args: argparse.Namespace) -> None:
    """Write table.csv, table.md and the pictures from what is there."""
    rows = collect(args)
    if not rows:
        sys.exit(f'realworld.py: there are no results in {args.results}.')
    with open(args.results / 'table.csv', 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = f'## Above the best baseline, dB\n\n{verdict(args, rows)}\n\n## All arms\n\n{tables(args, rows)}'
    (args.results / 'table.md').write_text(text, encoding='utf-8')
    print(text)
    draw_curves(args, rows)
    draw_crops(args)
    print(f'table.csv, table.md, curves_*.png and crops.png are in {args.results}.')


def all_jobs(args: argparse.Namespace) -> list[Job]:
    """Plain adaptations of everything first, the other variants then."""
    plain, others = [], []
    for seed, shots, track, arm in itertools.product(range(args.seeds), args.shots, args.tracks, args.arms):
        job = Job(args.data, args.results, track, arm, shots, seed, args.iterations, args.columns, ('',))
        plain.append(job)
        further = tuple(variant for variant in ARMS[arm].adapt if variant)
        if further:
            others.append(dataclasses.replace(job, variants=further))
    return plain + others


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument('--quick', action='store_true', help='one seed, five shots, main arms, short training')
    arguments.add_argument('--tracks', nargs='+', choices=TRACKS, default=[t for t in TRACKS if t != DEVELOPMENT])
    arguments.add_argument('--arms', nargs='+', choices=ARMS, help='these only')
    arguments.add_argument('--shots', nargs='+', type=int, choices=range(1, 6), help='default: 5, 1 and 2')
    arguments.add_argument('--seeds', type=int, help='default: 3')
    arguments.add_argument('--iterations', type=int, help=f'training steps, of {EPISODES * PATCHES} patches each')
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    arguments.add_argument('--jobs', type=int, default=workers, help='runs beside each other; default: %(default)s')
    arguments.add_argument('--report', action='store_true', help='run nothing, tabulate what is there')
    arguments.add_argument('--results', type=Path, help='default: benchmarks/results/realworld')
    args = parse(arguments)
    profile = QUICK if args.quick else FULL
    for key, value in profile.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.iterations < 200:  # measuring a relation takes some of them
        arguments.error('--iterations must be at least 200.')
    jobs = [] if args.report else [job for job in all_jobs(args) if job.missing()]
    # One thread each: networks this small gain little from more.
    with ProcessPoolExecutor(args.jobs, get_context('spawn'), torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        for done in tqdm(as_completed(futures), total=len(jobs), unit='run', disable=None):
            tqdm.write(done.result())
            sys.stdout.flush()
    report(args)


if __name__ == '__main__':
    main()
