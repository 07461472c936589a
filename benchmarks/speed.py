"""Speed and memory, as ratios to a peer that does the same in the same run.

Medians of repeats that take turns with the peer's; peak memory in processes of their own. Needs no data of yours.

    python benchmarks/speed.py                       # on a GPU where there is one
    python benchmarks/speed.py --rows fomaml maml    # these only
    python benchmarks/speed.py --rows real photo     # networks and a photograph of real size: for GPUs

Prints a Markdown table. Smaller is better, but for rates (FLOP/s), which are compared with what a product of matrices
reaches; `bar` is what we hold ourselves to. What a device cannot do (bfloat16, CUDA graphs) is left out. A group of
rows that fails is reported, and the others go on.
"""

from __future__ import annotations

# Before torch, so that its threads don't spin while others work.
import drtl_plugin  # noqa: F401  isort: skip
import argparse
import contextlib
import copy
import csv
import gc
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from basicsr.archs import build_network
from basicsr.data import degradations
from basicsr.data.prefetch_dataloader import CPUPrefetcher
from basicsr.models import build_model
from basicsr.models.realesrgan_model import RealESRGANModel
from basicsr.utils import DiffJPEG, USMSharp
from basicsr.utils.matlab_functions import imresize
from common import HERE, markdown_table
from matplotlib.figure import Figure
from peers import PEERS
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode

from drtl_plugin import cli
from drtl_plugin.api.upscale import upscale
from drtl_plugin.compat.basicsr import without_gpu
from drtl_plugin.data.image_files import image_size
from drtl_plugin.hooks import RelationHook
from drtl_plugin.models import DRTLModel
from drtl_plugin.options.parse import parse_options
from drtl_plugin.runtime.device import computes_bfloat16, lay_out
from drtl_plugin.runtime.tiles import restore
from drtl_plugin.runtime.trained_network import load_trained
from drtl_plugin.sources.sample import prepare_sample_data
from drtl_plugin.tasks.library import DistortionTask
from drtl_plugin.tasks.patches import paired_patches

OPTIONS = Path(__file__).parent.parent / 'options' / 'drtl_x4.yml'
TASKS, PATCHES, LQ_SIZE, SCALE = 4, 4, 48, 4
INNER_LR = 1e-2
RESULTS = HERE / 'results'
NETWORKS = {
    'RRDBNet': {
        **{'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'scale': SCALE},
        **{'num_feat': 64, 'num_block': 23, 'num_grow_ch': 32},
    },
    'SwinIR-M': {
        **{'type': 'SwinIR', 'upscale': SCALE, 'in_chans': 3, 'img_size': LQ_SIZE, 'window_size': 8, 'img_range': 1},
        **{'depths': [6] * 6, 'embed_dim': 180, 'num_heads': [6] * 6, 'mlp_ratio': 2},
        **{'upsampler': 'pixelshuffle', 'resi_connection': '1conv'},
    },
}


@dataclass(frozen=True)
class Row:
    """A line of the table: ours against a peer's, both in the same unit."""

    what: str
    peer: str
    ours: float
    theirs: float
    bar: float
    unit: str = 's'

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def device() -> str:
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of functions that take turns, another one first each time; each has run once before."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for repeat in range(repeats + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            synchronize()
            start = time.perf_counter()
            functions[name]()
            synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def options(model_type: str = 'DRTLModel', network: str | None = None, amp: str | None = None, **drtl: object) -> dict:
    """The shipped option file with EDSR of 64 features and 16 blocks, or another network, and patches of 48² at x4."""
    opt = yaml.safe_load(OPTIONS.read_text(encoding='utf-8'))
    opt.update(model_type=model_type, name='speed', num_gpu=int(torch.cuda.is_available()))
    opt['datasets']['train'].update(gt_size=LQ_SIZE * SCALE, num_support=PATCHES // 2, num_query=PATCHES // 2)
    opt['network_g'].update(num_feat=64, num_block=16)
    if network is not None:
        opt['network_g'] = dict(NETWORKS[network])
    opt['drtl'].update(camera_fit=False, **drtl)
    opt['train'].update(total_iter=1000, amp=amp)
    opt['logger']['use_tb_logger'] = False
    return opt


def parsed(opt: dict, is_train: bool = True) -> dict:
    path = Path(f'{opt["name"]}.yml')
    path.write_text(yaml.safe_dump(opt), encoding='utf-8')
    args = argparse.Namespace(opt=str(path), launcher='none', auto_resume=False, debug=False, force_yml=None)
    return parse_options(args, os.getcwd(), is_train)


def fed_model(opt: dict, tasks: int = TASKS) -> DRTLModel:
    """A model with a batch of episodes."""
    torch.manual_seed(0)
    model = build_model(parsed(opt))
    # Not its measuring of relations, which is a row of its own.
    model.hooks = []
    model.feed_data(default_collate([model.train_set[i] for i in range(tasks)]))
    return model


def precisions() -> tuple[str | None, ...]:
    return (None, 'bf16') if computes_bfloat16(torch.device(device())) else (None,)


def precise(amp: str | None) -> torch.autocast:
    """The context that peers compute in, as ours do."""
    return torch.autocast(device(), torch.bfloat16, enabled=amp == 'bf16', cache_enabled=False)


def meta_opt(
    algorithm: str, amp: str | None, steps: int = 1, checkpoint: bool = False, network: str | None = None
) -> dict:
    inner = {'algorithm': algorithm, 'lr': INNER_LR, 'steps': steps, 'checkpoint': checkpoint}
    opt = options(network=network, amp=amp, pipeline='meta', inner=inner, weighting={'relation': 'uniform'})
    opt['train']['ema_decay'] = 0
    return opt


def accelerated(opt: dict, how: str = '', tasks: int = TASKS) -> Callable[[], None]:
    """A step, made faster in one of several ways.

    - ``contiguous``, ``channels-last``: in torch's own memory layout, or in the other one
    - ``compiled``: by ``train.compile``
    - ``reduce-overhead``: by torch.compile's mode of this name, which has CUDA graphs of its own
    - ``CUDA graph``: the gradients of a whole step, recorded once and played again
    """
    if how == 'compiled':
        opt['train']['compile'] = True
    model = fed_model(opt, tasks)
    if how in ('contiguous', 'channels-last'):
        lay_out(model.net_g, torch.contiguous_format if how == 'contiguous' else torch.channels_last)
    elif how == 'reduce-overhead':
        model.net_g.compile(mode='reduce-overhead')
    elif how == 'CUDA graph':
        return recorded(model)
    return lambda: model.optimize_parameters(1)


def recorded(model: DRTLModel) -> Callable[[], None]:
    """A step whose gradients are a CUDA graph; the optimiser's part stays outside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.optimizer_g.zero_grad()
            model.backward(1)
    torch.cuda.current_stream().wait_stream(stream)
    # Made anew while recording, gradients are memory of the graph's own, which each play overwrites.
    model.optimizer_g.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.backward(1)

    def step() -> None:
        graph.replay()
        model.optimizer_g.step()
        if model.ema_decay > 0:
            model.model_ema(decay=model.ema_decay)

    return step


def our_step(
    algorithm: str,
    amp: str | None,
    steps: int = 1,
    checkpoint: bool = False,
    tasks: int = TASKS,
    how: str = '',
    network: str | None = None,
) -> Callable[[], None]:
    return accelerated(meta_opt(algorithm, amp, steps, checkpoint, network), how, tasks)


def variants(amp: str | None, compiles: bool = True) -> list[str]:
    """Ways of :func:`accelerated` that a device has; each costs half a minute of compiling or recording at most."""
    on_gpu = torch.cuda.is_available()
    return [
        *(['contiguous', 'CUDA graph'] if on_gpu else []),
        *(['compiled'] if compiles and amp == precisions()[-1] else []),
        *(['reduce-overhead'] if compiles and on_gpu and amp == precisions()[-1] else []),
    ]


def those_that_work(makers: dict[str, Callable[[], Callable[[], None]]]) -> tuple[dict, dict[str, float]]:
    """Steps that can be made and taken; why the others cannot is printed. And, on a GPU, the memory that they need."""
    steps, needed = {}, {}
    for name, make in makers.items():
        try:
            step = make()
            mebibytes = _gpu_peak(step)
        except Exception as error:
            print(f'{name}: {type(error).__name__}: {" ".join(str(error).split())[:600]}', file=sys.stderr)
            continue
        steps[name] = step
        if torch.cuda.is_available() and 'graph' not in name and 'reduce-overhead' not in name:  # whose memory stays
            needed[name] = mebibytes
    return steps, needed


def peer_step(peer: str, algorithm: str, amp: str | None = None, network: str | None = None) -> Callable[[], None]:
    """The same step with another library and plain Adam."""
    model = fed_model(meta_opt(algorithm, None, network=network))
    net = model.net_g.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99))
    criterion = nn.L1Loss()
    half = PATCHES // 2

    def step() -> None:
        optimizer.zero_grad()
        for lq, gt in zip(model.batch.lq, model.batch.gt, strict=True):
            support, query = (lq[:half], gt[:half]), (lq[half:], gt[half:])
            gradients = PEERS[peer](
                net, criterion, support, query, INNER_LR, 1, algorithm, precision=lambda: precise(amp)
            )
            for p, gradient in zip(net.parameters(), gradients, strict=True):
                p.grad = gradient / TASKS if p.grad is None else p.grad + gradient / TASKS
        optimizer.step()

    return step


def _peak(make: Callable[..., Callable[[], None]], arguments: tuple, folder: str) -> float:
    """MiB that three steps need beyond what there is before, in a process of its own."""
    os.chdir(folder)
    step = make(*arguments)
    Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
    before = _memory('VmRSS')
    for _ in range(3):
        step()
    return _memory('VmHWM') - before


def _memory(key: str) -> float:
    """MiB of this process, by its name in Linux's table."""
    lines = dict(line.split(':') for line in Path('/proc/self/status').read_text().splitlines())
    return int(lines[key].split()[0]) / 2**10


def _gpu_peak(step: Callable[[], None]) -> float:
    """MiB of GPU memory that steps need beyond what there is before the first of them, in which cuDNN tries kernels."""
    if not torch.cuda.is_available():
        step()
        return math.nan
    gc.collect()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak(make: Callable[..., Callable[[], None]], *arguments: object) -> float:
    if torch.cuda.is_available():  # whose memory is counted, not measured
        return _gpu_peak(make(*arguments))
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        return pool.submit(_peak, make, arguments, os.getcwd()).result()


def meta_rows(algorithm: str, bars: tuple[float, float], repeats: int, network: str | None = None) -> Iterator[Row]:
    label = f'{network}, {algorithm}' if network else algorithm
    # What torch.compile makes cannot be differentiated twice. A large network is compiled for minutes.
    compiles = algorithm != 'maml' and network is None
    peers = PEERS if network is None else ['higher']
    makers = {}
    for amp in precisions():
        precision = amp or 'fp32'
        makers[precision] = partial(our_step, algorithm, amp, network=network)
        makers |= {f'{peer}, {precision}': partial(peer_step, peer, algorithm, amp, network) for peer in peers}
        makers |= {
            f'{precision}, {how}': partial(our_step, algorithm, amp, how=how, network=network)
            for how in variants(amp, compiles)
        }
    steps, needed = those_that_work(makers)
    seconds = medians(steps, repeats)
    for amp, bar in zip(precisions(), bars, strict=False):
        precision = amp or 'fp32'
        for base in dict.fromkeys(['fp32', precision]):
            fastest = min((f'{peer}, {base}' for peer in peers if f'{peer}, {base}' in seconds), key=seconds.get)
            bound = bar if base == 'fp32' else bars[0]
            yield Row(f'{label} step, {precision}', fastest, seconds[precision], seconds[fastest], bound)
        reached = flops(steps[precision]) / seconds[precision]
        yield Row('the same, rate', 'product of matrices', reached, matrix_peak(amp), math.nan, 'GFLOP/s')
        for how in variants(amp, compiles):
            name = f'{precision}, {how}'
            if name in seconds:
                bound = 1 / 3 if torch.cuda.is_available() and how != 'contiguous' else math.nan
                yield Row(f'{label} step, {name}', fastest, seconds[name], seconds[fastest], bound)
                yield Row('the same', f'{precision} alone', seconds[name], seconds[precision], math.nan)
    steps.clear()
    for amp in precisions():
        precision = amp or 'fp32'
        memory = {name: needed.get(name) or peak(makers[name]) for name in seconds if name.endswith(precision)}
        ours = memory.pop(precision)
        leanest = min(memory, key=memory.get)
        yield Row(f'{label} step, {precision}, peak memory', leanest, ours, memory[leanest], 0.8, 'MiB')


def flops(step: Callable[[], None]) -> float:
    """Floating-point operations of a step, in billions: those of its convolutions and products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


def matrix_peak(amp: str | None) -> float:
    """What a product of two large matrices reaches here, in GFLOP/s, with TF32 where convolutions may take it."""
    n = 8192 if torch.cuda.is_available() else 2048
    matrix = torch.rand(n, n, device=device(), dtype=torch.bfloat16 if amp else torch.float32)
    matmul, allowed = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        return 2 * n**3 / 1e9 / medians({'product': lambda: matrix @ matrix}, 7)['product']
    finally:
        matmul.allow_tf32 = allowed


def checkpoint_rows(repeats: int) -> Iterator[Row]:
    """`maml` of three inner steps, each of which is taken again on the way back, against keeping their graphs."""
    steps = {side: our_step('maml', None, 3, side == 'ours') for side in ('ours', 'theirs')}
    yield Row('maml, 3 inner steps, checkpointed', 'not checkpointed', **medians(steps, repeats), bar=1.5)
    ours, theirs = (peak(our_step, 'maml', None, 3, checkpoint) for checkpoint in (True, False))
    yield Row('the same, peak memory', 'not checkpointed', ours, theirs, 0.8, 'MiB')


def task_rows(repeats: int) -> Iterator[Row]:
    """Peak memory of steps on 1 to 16 tasks; draws it into results/memory.png."""
    counts = (1, 2, 4, 8, 16)
    lines = {
        'fomaml': ('fomaml', None, 1, False),
        **{f'fomaml, {amp}': ('fomaml', amp, 1, False) for amp in precisions()[1:]},
        'maml': ('maml', None, 1, False),
        'maml, 3 inner steps': ('maml', None, 3, False),
        'maml, 3 inner steps, checkpointed': ('maml', None, 3, True),
    }
    figure = Figure(figsize=(9, 4), layout='constrained')
    axes = figure.add_subplot()
    for name, arguments in lines.items():
        needed = [peak(our_step, *arguments, tasks) for tasks in counts]
        axes.plot(counts, needed, marker='.', label=name)
        yield Row(f'{name}: 16 tasks, peak memory', '1 task', needed[-1], needed[0], 1.05, 'MiB')
    axes.set(xlabel='tasks a step', ylabel='peak memory, MiB', xscale='log', xticks=counts, xticklabels=counts, ylim=0)
    figure.legend(loc='outside right upper', fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / 'memory.png', dpi=110)


def pretrain_rows(repeats: int) -> Iterator[Row]:
    models = {}
    for relation, mode in (('uniform', 'sampling'), ('transfer', 'sampling'), ('transfer', 'gradient')):
        opt = options(pipeline='pretrain', weighting={'relation': relation, 'mode': mode})
        models[f'{relation}, {mode}'] = model = fed_model(opt)
        if relation != 'uniform':  # as if it were measured
            model.weights = torch.linspace(0.5, 1.5, len(model.library))
    plain = build_model({**parsed(opt), 'model_type': 'SRModel'})
    plain.feed_data({'lq': model.batch.lq.flatten(0, 1), 'gt': model.batch.gt.flatten(0, 1)})
    steps = {
        name: lambda model=model: model.optimize_parameters(1) for name, model in {**models, 'SRModel': plain}.items()
    }
    seconds = medians(steps, repeats)
    for name in models:
        yield Row(f'pretrain step, {name}', 'SRModel', seconds[name], seconds['SRModel'], 1.03)
    if torch.cuda.is_available():
        yield from fast_pretrain_rows(repeats)


def pretrain_opt(amp: str | None, network: str | None = None) -> dict:
    return options(network=network, amp=amp, pipeline='pretrain', weighting={'relation': 'uniform'})


def srmodel_step(amp: str | None, network: str | None = None) -> Callable[[], None]:
    """Plain BasicSR's; in autocast for bfloat16, which it has no option for."""
    model = fed_model(pretrain_opt(None, network))
    plain = build_model({**parsed(pretrain_opt(None, network)), 'model_type': 'SRModel'})
    plain.feed_data({'lq': model.batch.lq.flatten(0, 1), 'gt': model.batch.gt.flatten(0, 1)})

    def step() -> None:
        with precise(amp):
            plain.optimize_parameters(1)

    return step


def fast_pretrain_rows(repeats: int, network: str | None = None) -> Iterator[Row]:
    """Pre-training in bfloat16, compiled or recorded, against plain BasicSR in either precision."""
    label = f'{network}, pretrain step' if network else 'pretrain step'
    makers = {f'SRModel, {amp or "fp32"}': partial(srmodel_step, amp, network) for amp in precisions()}
    for amp in precisions():
        precision = amp or 'fp32'
        makers[precision] = partial(accelerated, pretrain_opt(amp, network))
        ways = variants(amp, network is None)
        # In full precision it is in torch's own layout already, as SRModel.
        ways = [how if amp or how != 'contiguous' else 'channels-last' for how in ways]
        makers |= {f'{precision}, {how}': partial(accelerated, pretrain_opt(amp, network), how) for how in ways}
    steps, needed = those_that_work(makers)
    seconds = medians(steps, repeats)
    for name in [name for name in seconds if 'SRModel' not in name]:
        for peer in dict.fromkeys(['SRModel, fp32', f'SRModel, {name[:4]}']):
            yield Row(f'{label}, {name}', peer, seconds[name], seconds[peer], 1.03)
    steps.clear()
    for amp in precisions():
        precision = amp or 'fp32'
        ours, theirs = (needed.get(name) or peak(makers[name]) for name in (precision, f'SRModel, {precision}'))
        yield Row(f'{label}, {precision}, peak memory', f'SRModel, {precision}', ours, theirs, 1.03, 'MiB')


def real_rows(repeats: int) -> Iterator[Row]:
    """Training and adaptation of networks of real size."""
    for network in NETWORKS:
        yield from fast_pretrain_rows(repeats, network)
        yield from meta_rows('fomaml', (0.75, 0.42), repeats, network)
        for amp in precisions():
            yield from adaptation_rows(min(repeats, 2), amp, network)


def photograph(size: tuple[int, int]) -> str:
    """A JPEG of (height, width)."""
    path = f'{size[0]}x{size[1]}.jpg'
    image = cv2.imread(str(min(Path('datasets/drtl_sample/auxiliary').iterdir())))
    cv2.imwrite(path, cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC))
    return path


def upscaling(name: str, precision: str, size: tuple[int, int]) -> tuple[float, float]:
    """Seconds of `basicsr upscale`, from JPEG to JPEG, without its start; and MiB of GPU memory."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    torch.save({'params': build_network(dict(network)).state_dict(), 'network': network, 'scale': SCALE}, 'net.pth')
    trained, full = load_trained('net.pth'), precision == 'fp32'
    upscale(trained, photograph((600, 600)), 'result.jpg', full_precision=full)
    source = photograph(size)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    _, failed = upscale(trained, source, 'result.jpg', full_precision=full)
    seconds = time.perf_counter() - start
    if failed:
        raise RuntimeError(failed[0])
    return seconds, torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else math.nan


def photo_rows(repeats: int) -> Iterator[Row]:
    """`basicsr upscale` of a photograph of 24 megapixels to 384, once in half and once in single precision."""
    torch.backends.cudnn.benchmark = False  # as the command has it
    for name in NETWORKS:
        (seconds, needed), (seconds32, needed32) = (upscaling(name, kind, (4000, 6000)) for kind in ('fp16', 'fp32'))
        yield Row(f'{name}, upscale of 24 MP, fp16', 'fp32', seconds, seconds32, math.nan)
        yield Row('the same, peak memory', 'fp32', needed, needed32, math.nan, 'MiB')


def relation_rows(repeats: int) -> Iterator[Row]:
    """The hook's measurement, against the training between two measurements."""
    model = build_model(parsed(options(pipeline='meta', hooks=[])))
    hook = next(hook for hook in model.hooks if isinstance(hook, RelationHook))
    model.hooks = []
    model.feed_data(default_collate([model.train_set[i] for i in range(TASKS)]))
    seconds = medians({'step': lambda: model.optimize_parameters(1)}, repeats)['step']
    synchronize()
    start = time.perf_counter()
    hook.measure(model)
    synchronize()
    measuring = time.perf_counter() - start
    yield Row('measuring the relation', 'training between', measuring, seconds * hook.interval, 0.03)


def in_numpy(task: DistortionTask, img: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A task on one image ``(H, W, 3)`` by BasicSR's functions and OpenCV."""
    for step in task.steps:
        drawn = {key: rng.uniform(*limits) for key, limits in step.ranges.items()}
        name = step.kind.name if step.kind else 'reduction'
        size = step.fixed.get('kernel_size')
        if name == 'reduction':
            img = imresize(img, 1 / task.scale)  # antialiased, as ours; cv2.resize is not
        elif name == 'gaussian_blur':
            img = cv2.filter2D(img, -1, degradations.bivariate_Gaussian(size, drawn['sigma'], drawn['sigma'], 0))
        elif name == 'anisotropic_blur':
            img = cv2.filter2D(img, -1, degradations.bivariate_Gaussian(size, *drawn.values(), isotropic=False))
        elif name == 'plateau_blur':
            sigma = drawn['sigma']
            img = cv2.filter2D(img, -1, degradations.bivariate_plateau(size, sigma, sigma, 0, drawn['beta']))
        elif name == 'sinc':
            with np.errstate(invalid='ignore', divide='ignore'):
                img = cv2.filter2D(img, -1, degradations.circular_lowpass_kernel(drawn['cutoff'], size))
        elif name == 'gaussian_noise':
            img = degradations.add_gaussian_noise(img, drawn['sigma'])
        elif name == 'poisson_noise':
            img = degradations.add_poisson_noise(np.clip(img, 0, 1), drawn['strength'])
        elif name == 'jpeg':
            img = degradations.add_jpg_compression(np.clip(img, 0, 1), int(drawn['quality']))
        elif name == 'sharpen':
            img = np.clip(img + drawn['weight'] * (img - cv2.GaussianBlur(img, (7, 7), 0)), 0, 1)
    return img


class PerImageDataset(Dataset):
    """Ground truth in memory, degraded one by one, so many rounds."""

    def __init__(self, tasks: tuple[DistortionTask, ...], gt: Tensor, rounds: int) -> None:
        self.rounds = rounds
        self.tasks = tasks
        self.images = gt.permute(0, 2, 3, 1).contiguous().numpy()

    def __getitem__(self, index: int) -> Tensor:
        rng = np.random.default_rng(index)
        cv2.setNumThreads(1)
        task = self.tasks[rng.integers(len(self.tasks))]
        lq = in_numpy(task, self.images[index % len(self.images)], rng)
        return torch.from_numpy(np.ascontiguousarray(lq.transpose(2, 0, 1), dtype=np.float32))

    def __len__(self) -> int:
        return self.rounds * len(self.images)


def synthesis_rows(repeats: int) -> Iterator[Row]:
    model = fed_model(options(pipeline='pretrain', weighting={'relation': 'uniform'}))
    # Ours come in episodes, whose images share a task; the peer's have one each.
    episodes = [default_collate([model.train_set[4 * b + i] for i in range(TASKS)]) for b in range(8)]
    gt = torch.cat([torch.cat([e['support_gt'], e['query_gt']], dim=1).flatten(0, 1) for e in episodes])
    # A loader's workers begin with nothing ready; over so many batches their start is of no account.
    rounds = 8
    dataset = PerImageDataset(model.library.tasks, gt, rounds)
    loader = DataLoader(dataset, TASKS * PATCHES, num_workers=os.cpu_count())

    def ours(rounds: int = 1) -> None:
        for _ in range(rounds):
            model.num_update += 1
            for episode in episodes:
                model.feed_data(episode)

    seconds = medians({'ours': lambda: ours(rounds), 'theirs': lambda: list(loader)}, repeats)
    yield Row('synthesis of 64 batches', "BasicSR's functions for each image", **seconds, bar=0.5)
    yield from against_realesrgan(episodes, ours, repeats)


def against_realesrgan(episodes: list[dict], ours: Callable, repeats: int) -> Iterator[Row]:
    # Its constructor wants option file and networks; the degradations do not.
    peer = object.__new__(RealESRGANModel)
    peer.opt, peer.is_train, peer.device = REALESRGAN, True, torch.device(device())
    peer.jpeger, peer.usm_sharpener = DiffJPEG(differentiable=False).to(peer.device), USMSharp().to(peer.device)
    peer.queue_size = 10 * TASKS * PATCHES
    kernel = torch.from_numpy(degradations.bivariate_Gaussian(21, 1.5, 1.5, 0)).float()
    batches = []
    for episode in episodes:
        gt = torch.cat([episode['support_gt'], episode['query_gt']], dim=1).flatten(0, 1)
        kernels = kernel.expand(len(gt), -1, -1)
        batches.append({'gt': gt, 'kernel1': kernels, 'kernel2': kernels, 'sinc_kernel': kernels})

    def theirs() -> None:
        for batch in batches:
            peer.feed_data(batch)

    with without_gpu():
        seconds = medians({'ours': ours, 'theirs': theirs}, repeats)
    yield Row(
        'synthesis of 8 batches', 'one of two orders of RealESRGANModel', seconds['ours'], seconds['theirs'] / 2, 1
    )


# The degradations of Real-ESRGAN's training, as its option file has them.
REALESRGAN = {
    **{'scale': SCALE, 'gt_size': LQ_SIZE * SCALE},
    **{'resize_prob': [0.2, 0.7, 0.1], 'resize_range': [0.15, 1.5]},
    **{'gaussian_noise_prob': 0.5, 'noise_range': [1, 30], 'poisson_scale_range': [0.05, 3]},
    **{'gray_noise_prob': 0.4, 'jpeg_range': [30, 95], 'second_blur_prob': 0.8},
    **{'resize_prob2': [0.3, 0.4, 0.3], 'resize_range2': [0.3, 1.2]},
    **{'gaussian_noise_prob2': 0.5, 'noise_range2': [1, 25], 'poisson_scale_range2': [0.05, 2.5]},
    **{'gray_noise_prob2': 0.4, 'jpeg_range2': [30, 95]},
}


def waiting_rows(repeats: int) -> Iterator[Row]:
    """Time that a training spends waiting for the loader of the shipped option file."""
    model = fed_model(options(pipeline='meta', weighting={'relation': 'uniform'}))
    train = model.opt['datasets']['train']
    workers = train['num_worker_per_gpu']
    prefetcher = CPUPrefetcher(DataLoader(model.train_set, TASKS, num_workers=workers))
    waiting, whole = [], []
    for iteration in range(1, 8 * repeats + 1):
        start = time.perf_counter()
        batch = prefetcher.next()
        waiting.append(time.perf_counter() - start)
        model.feed_data(batch)
        model.optimize_parameters(iteration)
        synchronize()
        whole.append(time.perf_counter() - start)
    yield Row('waiting for data', 'iteration', statistics.mean(waiting[4:]), statistics.mean(whole[4:]), 0.05)


def adaptation_rows(repeats: int, amp: str | None = None, network: str | None = None) -> Iterator[Row]:
    steps, batch_size, lr = 10, 8, 3e-4
    adapt = {'steps': steps, 'batch_size': batch_size, 'lr': lr, 'replay': 0}
    opt = options(network=network, amp=amp, pipeline='pretrain', weighting={'relation': 'uniform'}, adapt=adapt)
    model = build_model(parsed(opt))

    def plain() -> None:
        # As BasicSR would load it; ours chooses its own layout.
        net = copy.deepcopy(model.trained_network()).to(memory_format=torch.contiguous_format).train()
        average = torch.optim.swa_utils.AveragedModel(
            net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            lq, gt = paired_patches(model.target_pairs, batch_size, LQ_SIZE, generator, True, True)
            optimizer.zero_grad()
            with precise(amp):
                loss = nn.functional.l1_loss(net(lq.to(device())), gt.to(device()))
            loss.backward()
            optimizer.step()
            average.update_parameters(net)

    seconds = medians({'ours': model.adapt_to_target, 'theirs': plain}, repeats)
    label = f'{network}, adaptation step' if network else 'adaptation step'
    ours, theirs = (seconds[side] / steps for side in ('ours', 'theirs'))
    yield Row(f'{label}, {amp}' if amp else label, f'plain loop{f", {amp}" if amp else ""}', ours, theirs, 1.02)
    if network is not None and torch.cuda.is_available():
        needed = [peak(lambda run=run: run) for run in (model.adapt_to_target, plain)]
        yield Row(f'{label}, {amp or "fp32"}, peak memory', 'plain loop', *needed, 1.02, 'MiB')


def testing_rows(repeats: int) -> Iterator[Row]:
    model = build_model(parsed(options(pipeline='pretrain', weighting={'relation': 'uniform'})))
    torch.save({'params': model.net_g.state_dict()}, 'net.pth')
    opt = options()
    del opt['datasets']['train'], opt['train'], opt['drtl']
    opt['path'] = {'pretrain_network_g': 'net.pth', 'strict_load_g': True}
    opt['val']['save_img'] = False
    runs = {}
    for side, model_type in (('ours', 'DRTLModel'), ('theirs', 'SRModel')):
        path = f'test_{model_type}.yml'
        Path(path).write_text(yaml.safe_dump({**opt, 'name': side, 'model_type': model_type}), encoding='utf-8')
        runs[side] = lambda path=path: quietly(['test', '-opt', path])
    yield Row('basicsr test', 'SRModel', **medians(runs, repeats), bar=1.02)


def tile_step(size: int) -> Callable[[], None]:
    net = build_model(parsed(options(pipeline='pretrain', weighting={'relation': 'uniform'}))).net_g.eval()
    lay_out(net, torch.channels_last)
    lq = torch.rand(1, 3, size, size, device=device())
    return lambda: restore(net, lq, SCALE, 1, tile=64)


def tile_rows(repeats: int) -> Iterator[Row]:
    """Peak memory of restoring an image by tiles, less the result, against one of a quarter of its pixels."""
    small, large = (peak(tile_step, size) - 3 * (SCALE * size) ** 2 * 4 / 2**20 for size in (256, 512))
    yield Row('restoring by tiles, peak memory', 'a quarter of the image', large, small, 1.05, 'MiB')


def quietly(argv: list[str]) -> None:
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        if cli.main(argv):
            raise RuntimeError(f'basicsr {" ".join(argv)} failed.')


ROWS: dict[str, Callable[[int], Iterator[Row]]] = {
    'fomaml': lambda repeats: meta_rows('fomaml', (0.75, 0.42), repeats),
    'maml': lambda repeats: meta_rows('maml', (0.8, 0.42), repeats),
    'checkpoint': checkpoint_rows,
    'tasks': task_rows,
    'pretrain': pretrain_rows,
    'relation': relation_rows,
    'synthesis': synthesis_rows,
    'waiting': waiting_rows,
    'adaptation': lambda repeats: (row for amp in precisions() for row in adaptation_rows(repeats, amp)),
    'tiles': tile_rows,
    'test': testing_rows,
    'real': real_rows,
    'photo': photo_rows,
}
# Hours on a CPU.
LARGE = ('real', 'photo')


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--rows', nargs='+', choices=ROWS, default=[name for name in ROWS if name not in LARGE])
    arguments.add_argument('--repeats', type=int, default=7, help='default: %(default)s')
    arguments.add_argument('--csv', type=Path, help='file that rows are appended to as they come')
    args = arguments.parse_args()
    logging.raiseExceptions = False  # what basicsr test has closed, BasicSR's logger still writes to
    table = args.csv and args.csv.absolute()
    # As basicsr train and basicsr test set it.
    torch.backends.cudnn.benchmark = True
    body = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for path in prepare_sample_data().glob('auxiliary/*'):
            if min(image_size(str(path))) < LQ_SIZE * SCALE:
                path.unlink()
        for name in args.rows:
            began = time.monotonic()
            try:
                for row in ROWS[name](args.repeats):
                    figures = (f'{value:.3g} {row.unit}' for value in (row.ours, row.theirs))
                    body.append([row.what, row.peer, *figures, f'{row.ratio:.3f}', f'{row.bar:.3g}'])
                    print('  '.join(body[-1]), file=sys.stderr, flush=True)
                    if table:
                        with table.open('a', newline='', encoding='utf-8') as file:
                            csv.writer(file).writerow([row.what, row.peer, row.ours, row.theirs, row.bar, row.unit])
            except Exception:
                traceback.print_exc()
                body.append([f'{name}: failed', '', '', '', '', ''])
            print(f'{name}: {time.monotonic() - began:.0f} s', file=sys.stderr, flush=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f'{os.cpu_count()} CPU cores'
    print(f'torch {torch.__version__}, {name}')
    if torch.cuda.is_available():
        print(f'CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}; fp32: convolutions in TF32')
    print()
    print(markdown_table(['what', 'peer', 'ours', "peer's", 'ratio', 'bar'], body))


if __name__ == '__main__':
    main()
