"""Few-shot super-resolution of real cameras: DRTL and its baselines at equal numbers of gradient evaluations.

City100's cameras, adapted on 1, 2 or 5 pairs of `support`, judged on `val`; auxiliary photographs from BSDS500. Every
arm is a run of DRTLModel with the options that ARMS shows; the number of gradient evaluations (one patch, forward and
backward) is the same for all, what measuring a relation takes included. PSNR and SSIM on luma after 0 to 1000 steps of
adaptation. What is done is kept in benchmarks/results/realworld and not done again, so that a run may be interrupted.

    python benchmarks/realworld.py --quick             # one seed, five pairs, main arms: 10 minutes on 2 CPU cores
    python benchmarks/realworld.py                     # everything

Writes table.csv, table.md, curves_*.png and crops_*.png there. Uses a GPU where there is one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from common import HERE, LQ_SIZE, parse, parser, read_pairs

import torch  # isort: skip
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from drtl_plugin.models import DRTLModel
from drtl_plugin.options import AdaptOptions, parse_section

# The last one was used to choose options, and is not reported unless asked for.
TRACKS = {
    'nikon_x4': ('city100_nikon', 4),
    'nikon_x3': ('city100_nikon', 3),
    'iphone_x2': ('city100_iphone', 2),
    'iphone_x4': ('city100_iphone', 4),
}
DEVELOPMENT = 'iphone_x4'
COLUMNS = (0, 1, 10, 50, 200, 1000)
EPISODES, PATCHES = 4, 4  # tasks a step, and patches of each

UNIFORM = {'relation': 'uniform'}
TRANSFER = {'relation': 'transfer', 'mode': 'sampling'}
PLAIN, REPLAY, FITTED_REPLAY = {}, {'replay': 0.5}, {'replay': 0.5, 'replay_source': 'support'}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train the network, and the ways in which it is adapted then.

    Attributes:
        drtl (dict): The ``drtl`` section.
        adapt (dict): By name, options of ``drtl.adapt``.
        distortions: Of ``datasets.train``.
        knows_target (bool): Whether training looks at the support pairs: then it is repeated for each number of them.
        trained (bool): Whether there is a training at all.
    """

    drtl: dict
    adapt: dict = dataclasses.field(default_factory=lambda: {'': PLAIN})
    distortions: object = 'default'
    knows_target: bool = False
    trained: bool = True


def drtl_arm(drtl: dict, **adapt: dict) -> Arm:
    return Arm(drtl, {'': PLAIN, **adapt}, knows_target=True)


BASELINES = {
    'scratch': Arm({'weighting': UNIFORM}, {'': {'lr': 1e-3}}, trained=False),
    'bicubic': Arm({'pipeline': 'pretrain', 'weighting': UNIFORM}, distortions=[{'name': 'bicubic'}]),
    'uniform': Arm({'pipeline': 'pretrain', 'weighting': UNIFORM}),
    'uniform meta': Arm({'pipeline': 'meta', 'weighting': UNIFORM}),
}
FIT = {'camera_fit': True}
ARMS = {
    **BASELINES,
    'DRTL weights': drtl_arm({'pipeline': 'pretrain', 'weighting': TRANSFER}, replay=REPLAY),
    'DRTL weights meta': drtl_arm({'pipeline': 'meta', 'weighting': TRANSFER}, replay=REPLAY),
    'fit alone': drtl_arm(
        {'pipeline': 'pretrain', **FIT, 'weighting': {**UNIFORM, 'mode': 'sampling', 'fit_share': 1}},
        fitted_replay=FITTED_REPLAY,
    ),
    'DRTL': drtl_arm(
        {'pipeline': 'pretrain', **FIT, 'weighting': TRANSFER},
        replay=REPLAY,
        fitted_replay=FITTED_REPLAY,
        low_rank={'rank': 4, 'lr': 1e-3},
    ),
    'DRTL meta': drtl_arm({'pipeline': 'meta', **FIT, 'weighting': TRANSFER}, fitted_replay=FITTED_REPLAY),
}
DEFAULT = 'DRTL'
QUICK_ARMS = ('bicubic', 'uniform', 'DRTL')


@dataclasses.dataclass(frozen=True)
class Job:
    """One training, with the adaptations from it."""

    data: Path
    results: Path
    track: str
    arm: str
    shots: int
    seed: int
    iterations: int
    columns: tuple[int, ...]

    @property
    def trained_for(self) -> int:
        """Shots that the training depends on, or 0."""
        return self.shots if ARMS[self.arm].knows_target else 0

    def path(self, variant: str) -> Path:
        name = '_'.join([self.arm, *([variant] if variant else [])]).replace(' ', '_')
        return self.results / self.track / f'{name}_k{self.shots}_s{self.seed}.json'

    @property
    def network(self) -> Path:
        return self.results / self.track / f'{self.arm.replace(" ", "_")}_k{self.trained_for}_s{self.seed}.pth'

    def missing(self) -> list[str]:
        """Adaptations that are not done yet."""
        return [variant for variant in ARMS[self.arm].adapt if not self.path(variant).is_file()]


def options(job: Job) -> dict:
    """The option file of a job, as BasicSR would hand it over."""
    camera, scale = TRACKS[job.track]
    arm = ARMS[job.arm]
    iterations, relation = job.iterations, arm.drtl['weighting']['relation']
    hooks = []
    if relation == 'transfer':
        steps, interval, library = 10, job.iterations * 3 // 10, 17 + arm.drtl.get('camera_fit', False)
        # Each measurement costs steps on 8 patches of every task.
        cost = 2 * library * steps * 8 // (EPISODES * PATCHES)
        iterations -= cost
        hooks = [{'type': 'RelationHook', 'interval': interval, 'transfer_steps': steps}]
    target = {
        'dataroot_gt': str(job.data / camera / 'support' / 'hr'),
        'dataroot_lq': str(job.data / camera / 'support' / f'lr_x{scale}'),
        'num_shot': job.shots,
        'seed': job.seed,
    }
    train = {
        'name': 'auxiliary tasks',
        'type': 'DistortionTaskDataset',
        'dataroot_gt': str(job.data / 'bsds500_train'),
        'gt_size': LQ_SIZE * scale,
        'num_support': PATCHES // 2,
        'num_query': PATCHES // 2,
        'distortions': arm.distortions,
        'seed': job.seed,
        'scale': scale,
        'target': target,
        'camera_fit': arm.drtl.get('camera_fit', False),
    }
    return {
        'name': 'realworld',
        'model_type': 'DRTLModel',
        'scale': scale,
        'num_gpu': int(torch.cuda.is_available()),
        'manual_seed': job.seed,
        'is_train': True,
        'dist': False,
        'datasets': {'train': train},
        'network_g': {
            **{'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 32, 'num_block': 4},
            **{'upscale': scale, 'res_scale': 1},
        },
        'drtl': {**copy.deepcopy(arm.drtl), 'hooks': hooks},
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
    """The model of a job, trained or as it was trained before, and the seconds that training took."""
    torch.manual_seed(job.seed)
    opt = options(job)
    model = DRTLModel(opt)
    if not ARMS[job.arm].trained:
        return model, 0.0
    if job.network.is_file():
        state = torch.load(job.network, map_location=model.device, weights_only=True)
        model.net_g.load_state_dict(state['params'])
        model.net_g_ema.load_state_dict(state['params'])
        model.weights = state['weights']
        return model, state['seconds']
    start = time.perf_counter()
    # The records go to an experiment's folder, which there is none of.
    model.hooks = [hook for hook in model.hooks if type(hook).__name__ == 'RelationHook']
    total = opt['train']['total_iter']
    for iteration in range(1, total + 1):
        model.update_learning_rate(iteration)
        episodes = range((iteration - 1) * EPISODES, iteration * EPISODES)
        model.feed_data(default_collate([model.task_data[index] for index in episodes]))
        model.optimize_parameters(iteration)
    seconds = time.perf_counter() - start
    state = {'params': model.net_g_ema.state_dict(), 'weights': model.weights, 'seconds': seconds}
    unfinished = job.network.with_suffix(f'.{os.getpid()}')
    torch.save(state, unfinished)
    os.replace(unfinished, job.network)
    return model, seconds


@torch.no_grad()
def restore(model: DRTLModel, net: nn.Module, lq: Tensor) -> Tensor:
    """An image ``(3, h, w)`` of uint8, restored: ``(1, 3, s h, s w)``, on the CPU."""
    with model.precision():
        return net(lq[None].to(model.device) / 255).float().cpu()


def score(result: Tensor, gt: Tensor, scale: int) -> tuple[float, float]:
    """PSNR (dB) and SSIM on luma, a border of ``scale`` pixels left out."""
    images = [tensor2img(image) for image in (result, gt[None] / 255)]
    return tuple(
        float(metric(*images, crop_border=scale, test_y_channel=True)) for metric in (calculate_psnr, calculate_ssim)
    )


def evaluate(model: DRTLModel, net: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Mean PSNR and SSIM over pairs."""
    scores = [score(restore(model, net, lq), gt, model.library.scale) for lq, gt in pairs]
    return [statistics.mean(values) for values in zip(*scores)]


def adapt(model: DRTLModel, variant: dict, columns: tuple[int, ...], pairs: list) -> dict:
    """Scores by number of adaptation steps."""
    section = parse_section(AdaptOptions, {**variant, 'steps': columns[-1]}, 'adapt')
    model.drtl = dataclasses.replace(model.drtl, adapt=section)
    scores = {}
    for step, net in enumerate(model.adaptation_course(model.target_pairs, columns[-1])):
        if step in columns:
            scores[step] = evaluate(model, net, pairs)
    return scores


def run(job: Job) -> str:
    """Do what is missing of a job; returns what was done, in a line."""
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


def _one_thread_each(jobs: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument('--quick', action='store_true', help='one seed, five pairs, main arms, short training')
    arguments.add_argument('--tracks', nargs='+', choices=TRACKS, default=[t for t in TRACKS if t != DEVELOPMENT])
    arguments.add_argument('--arms', nargs='+', choices=ARMS, default=None)
    arguments.add_argument('--shots', nargs='+', type=int, default=[5, 1, 2])
    arguments.add_argument('--seeds', type=int, default=3)
    arguments.add_argument('--iterations', type=int, default=1000)
    arguments.add_argument('--results', type=Path, default=HERE / 'results' / 'realworld')
    args = parse(arguments)
    jobs = [
        Job(args.data, args.results, track, arm, shots, seed, args.iterations, COLUMNS)
        for seed in range(args.seeds)
        for shots in args.shots
        for track in args.tracks
        for arm in args.arms or ARMS
    ]
    jobs = [job for job in jobs if job.missing()]
    num = 1 if torch.cuda.is_available() else os.cpu_count()
    with ProcessPoolExecutor(num, get_context('spawn'), _one_thread_each, (num,)) as pool:
        for done in tqdm(as_completed([pool.submit(run, job) for job in jobs]), total=len(jobs), disable=None):
            tqdm.write(done.result())
            import sys

            sys.stdout.flush()


if __name__ == '__main__':
    main()
