"""Option files at the door: read safely, checked once, turned into typed objects whose defaults stand here alone."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Literal, Optional
from unittest import mock

import torch
import yaml
from basicsr.utils import options as basicsr_options
from basicsr.utils import set_random_seed
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from drtl_plugin.errors import OptionError, unknown
from drtl_plugin.runtime.distributed import init_dist, of_first_process


def option(default: Any, doc: str, low: float = -math.inf, high: float = math.inf) -> Any:
    """A field of an option section: its default, what it means, and its range (inclusive) if it is a number."""
    metadata = {'doc': doc, 'low': low, 'high': high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class WeightingOptions:
    """``drtl.weighting``: how relations become weights (:func:`drtl_plugin.relation.weights.relation_weights`)."""

    relation: str = option(
        'transfer',
        'How relations are obtained: transfer, embedding, gradient, uniform (drtl_plugin.relation.estimators), or an '
        'estimator of your own.',
    )
    effective_tasks: float = option(
        6.0, 'Wanted effective number of tasks, exp(entropy of the weights), before the floor.', low=1
    )
    temperature: Optional[float] = option(None, 'Softmax temperature; takes the place of effective_tasks.', low=1e-6)
    floor: float = option(0.2, 'Share of the weights that is spread evenly over all tasks.', 0, 1)
    fit_share: float = option(
        0.9,
        'Share of the total weight reserved for the camera fit; its relation adds to it. With drtl.camera_fit only.',
        0,
        1,
    )
    mode: Literal['gradient', 'sampling'] = option(
        'sampling',
        "gradient: weights multiply the tasks' gradients; sampling: tasks are drawn with probability proportional to "
        'their weight.',
    )


@dataclass(frozen=True)
class InnerOptions:
    """``drtl.inner``: the inner loop of the meta-learning pipeline (:mod:`drtl_plugin.meta.learner`)."""

    algorithm: Literal['fomaml', 'maml', 'reptile'] = option(
        'fomaml', 'How the outer gradient is obtained: first order, exact (second order), or Reptile.'
    )
    lr: float = option(1e-2, 'Step size of the inner loop.', low=1e-12)
    steps: int = option(1, 'Gradient steps of the inner loop.', low=1)
    checkpoint: bool = option(
        False,
        'maml: recompute inner steps in the backward pass instead of storing their graphs (less memory, more time).',
    )
    parameters: List[str] = option(
        ['*'], 'Patterns of the names of the parameters that the inner loop adapts (ANIL), e.g. conv_last.*.'
    )
    rate_lr: float = option(
        0.0,
        "Meta-SGD: Adam's learning rate for learned per-weight step sizes, initialised to lr; 0 keeps them fixed.",
        low=0,
    )


@dataclass(frozen=True)
class AdaptOptions:
    """``drtl.adapt``: few-shot adaptation to the target (:mod:`drtl_plugin.meta.adaptation`)."""

    steps: int = option(50, 'Steps on the support set; the most that early_stop may take.', low=0)
    lr: float = option(3e-4, 'Learning rate of Adam.', low=0)
    warmup: int = option(
        50,
        "Steps over which Adam's learning rate rises to lr; otherwise its first steps harm a trained network.",
        0,
    )
    optimizer: Literal['adam', 'inner'] = option(
        'adam', "Adam, or plain gradient descent with the inner loop's step sizes and parameters."
    )
    batch_size: int = option(8, 'Patches a step.', low=1)
    replay: float = option(0.5, 'Share of synthetic patches in a batch.', 0, 1)
    replay_source: Literal['auxiliary', 'support'] = option(
        'auxiliary',
        "What is replayed: auxiliary photographs under tasks drawn by weight, or the support's own ground truth under "
        'the camera fit (with drtl.camera_fit only).',
    )
    ema_decay: float = option(0.99, 'Decay of the moving average of the adapted weights (0: none).', 0, 1)
    early_stop: bool = option(
        False, 'Choose the number of steps on a held-out fifth of the pairs, then adapt to all of them.'
    )
    rank: int = option(0, 'Rank of low-rank adapters, merged at the end; 0 adapts the weights themselves.', low=0)


@dataclass(frozen=True)
class DRTLOptions:
    """The ``drtl:`` section of an option file."""

    pipeline: Literal['pretrain', 'meta'] = option('meta', 'Which of the two pipelines of the paper trains net_g.')
    weighting: WeightingOptions = field(default_factory=WeightingOptions)
    inner: InnerOptions = field(default_factory=InnerOptions)
    adapt: AdaptOptions = field(default_factory=AdaptOptions)
    camera_fit: bool = option(
        True,
        "Fit the camera's own degradation to the target's pairs (drtl_plugin.tasks.camera_fit.fit): one more auxiliary "
        "task, and auxiliary photographs as soft as the camera's ground truth.",
    )
    target_weight: float = option(0.0, "lambda_t: weight of the target's own gradient in each step.", low=0)
    hooks: List[dict] = option([], 'Meta-trainer hooks: settings of those shipped, and further ones, by type.')

    @classmethod
    def from_opt(cls, opt: dict) -> DRTLOptions:
        """Parse ``opt['drtl']``.

        Raises:
            OptionError: For unknown keys, wrong types or values out of range; names the key.
        """
        options = parse_section(cls, opt.get('drtl'), 'drtl')
        inner, adapt = options.inner, options.adapt
        if inner.rate_lr > 0 and (inner.algorithm == 'reptile' or options.pipeline == 'pretrain'):
            raise OptionError('drtl.inner.rate_lr: step sizes are learned by pipeline: meta with maml or fomaml only.')
        if inner.checkpoint and (inner.algorithm != 'maml' or options.pipeline == 'pretrain'):
            raise OptionError('drtl.inner.checkpoint: only maml in pipeline: meta keeps graphs that could be left out.')
        if options.pipeline == 'meta' and inner.algorithm == 'reptile' and inner.steps < 2:
            raise OptionError('drtl.inner.steps: reptile takes at least 2, support and query in turn.')
        if options.pipeline == 'meta' and inner.algorithm == 'reptile' and inner.parameters != ['*']:
            raise OptionError('drtl.inner.parameters: reptile trains what its inner loop adapts, so all; use maml.')
        if 0 < adapt.replay < 1 and adapt.batch_size < 2:
            raise OptionError(
                'drtl.adapt.batch_size: replay needs at least 2 patches a step; or set drtl.adapt.replay to 0.'
            )
        if adapt.replay > 0 and adapt.replay_source == 'support' and not options.camera_fit:
            raise OptionError('drtl.adapt.replay_source: support needs drtl.camera_fit: true.')
        if adapt.optimizer == 'inner' and adapt.rank:
            raise OptionError('drtl.adapt.rank: low-rank adapters have no inner step sizes; use optimizer: adam.')
        return options


@dataclass(frozen=True)
class TargetOptions:
    """``datasets.train.target``: the support set, K pairs of the camera (:class:`FewShotPairDataset`)."""

    dataroot_gt: str = option(dataclasses.MISSING, 'Folder or .lmdb of GT images.')
    dataroot_lq: str = option(dataclasses.MISSING, 'Folder or .lmdb of LQ images.')
    num_shot: int = option(5, 'K, the number of pairs used.', low=1)
    seed: int = option(0, 'Seed that selects K pairs if there are more.')
    names: Optional[List[str]] = option(None, 'Names of the pairs to use (without extension); overrides seed.')
    meta_info_file: Optional[str] = option(None, 'Text file that lists the images, as in BasicSR.')
    filename_tmpl: str = option('{}', 'How LQ names derive from GT names, as in BasicSR.')
    io_backend: dict = option({'type': 'disk'}, 'disk or lmdb.')


@dataclass(frozen=True)
class TaskDatasetOptions:
    """``datasets.train`` for ``type: DistortionTaskDataset``; the loader's keys are BasicSR's."""

    name: str = option(dataclasses.MISSING, 'Name of the dataset, for the log.')
    type: str = option(dataclasses.MISSING, 'DistortionTaskDataset.')
    dataroot_gt: str = option(dataclasses.MISSING, 'Folder or .lmdb of ground-truth images for the auxiliary tasks.')
    meta_info_file: Optional[str] = option(None, 'Text file that lists the images, as in BasicSR.')
    io_backend: dict = option({'type': 'disk'}, 'disk or lmdb.')
    gt_size: int = option(128, 'Side of the ground-truth patches in pixels; a multiple of scale.', low=8)
    num_support: int = option(4, 'Support patches an episode.', low=1)
    num_query: int = option(4, 'Query patches an episode.', low=1)
    num_episodes: int = option(1_000_000, 'Different episodes; each is a function of seed and index.', low=1)
    seed: int = option(0, 'Seed of the episodes; default: manual_seed.')
    use_hflip: bool = option(True, 'Random horizontal flips.')
    use_rot: bool = option(True, 'Random quarter turns.')
    distortions: Any = option('default', "The auxiliary tasks: a list, or 'default' for the shipped library.")
    target: Optional[TargetOptions] = option(None, 'The support set of the target camera.')
    camera_fit: bool = option(False, 'Set from drtl.camera_fit.')
    image_cache_mb: float = option(
        512,
        'Memory in MiB for decoded images, which the loader processes and the model share (those of each GPU, with '
        'several). Images that fit are decoded once.',
        low=0,
    )
    batch_size_per_gpu: int = option(4, 'Episodes a step: the meta batch.', low=1)
    num_worker_per_gpu: int = option(1, 'Loader processes.', low=0)
    prefetch_mode: Optional[str] = option(None, 'As in BasicSR.')
    num_prefetch_queue: int = option(1, 'As in BasicSR.', low=1)
    pin_memory: bool = option(False, 'As in BasicSR.')
    persistent_workers: bool = option(False, 'As in BasicSR.')
    phase: str = option('train', 'Set by BasicSR.')
    scale: int = option(1, 'Set by BasicSR.', low=1)


@dataclass(frozen=True)
class PairedDatasetOptions:
    """``datasets.val…`` and ``datasets.test…`` (and, for BasicSR's models, ``train``): ``PairedImageDataset``."""

    name: str = option(dataclasses.MISSING, 'Name of the dataset, for the log and for folders of images.')
    type: str = option(dataclasses.MISSING, 'PairedImageDataset.')
    dataroot_gt: str = option(dataclasses.MISSING, 'Folder or .lmdb of ground-truth images.')
    dataroot_lq: str = option(dataclasses.MISSING, 'Folder or .lmdb of low-quality images.')
    meta_info_file: Optional[str] = option(None, 'Text file that lists the images.')
    filename_tmpl: str = option('{}', 'How LQ names derive from GT names, e.g. {}x4.')
    io_backend: dict = option({'type': 'disk'}, 'disk or lmdb.')
    mean: Optional[List[float]] = option(None, 'Subtracted from each channel.')
    std: Optional[List[float]] = option(None, 'Divisor for each channel.')
    color: Optional[Literal['y', 'rgb']] = option(None, 'y: luma only.')
    use_shuffle: bool = option(True, 'Accepted for compatibility with BasicSR; ignored.')
    gt_size: int = option(128, 'Training: side of the ground-truth patches in pixels.', low=1)
    use_hflip: bool = option(True, 'Training: random horizontal flips.')
    use_rot: bool = option(True, 'Training: random quarter turns.')
    batch_size_per_gpu: int = option(1, 'Training: patches a step.', low=1)
    num_worker_per_gpu: int = option(0, 'Training: loader processes.', low=0)
    dataset_enlarge_ratio: float = option(1, 'Training: passes over the images an epoch.', low=1e-6)
    prefetch_mode: Optional[Literal['cpu', 'cuda']] = option(None, 'Load ahead; cuda: onto the GPU.')
    num_prefetch_queue: int = option(1, 'For prefetch_mode cpu: how many batches ahead.', low=1)
    pin_memory: bool = option(False, 'For prefetch_mode cuda.')
    persistent_workers: bool = option(False, 'Keep loader processes from epoch to epoch; not with prefetch_mode cpu.')
    phase: str = option('val', 'Set by BasicSR.')
    scale: int = option(1, 'Set by BasicSR.', low=1)


@dataclass(frozen=True)
class PathOptions:
    """``path``: where a run begins; where it writes is BasicSR's to say."""

    pretrain_network_g: Optional[str] = option(None, 'Weights to begin with, or to test.')
    param_key_g: Optional[str] = option(
        'params',
        'Which weights of that file: params, params_ema, or null for weights without a key. If this is not written and '
        'the file has no params, params_ema is taken, then weights without a key; the log names the key.',
    )
    strict_load_g: bool = option(True, 'Whether the weights must be exactly those of network_g.')
    pretrain_network_d: Optional[str] = option(None, 'Weights of the discriminator to begin with.')
    param_key_d: Optional[str] = option('params', 'Which weights of that file; as param_key_g.')
    strict_load_d: bool = option(True, 'Whether the weights must be exactly those of network_d.')
    pretrain_network_r: Optional[str] = option(None, 'Weights of a trained distortion relation network (DRN).')
    strict_load_r: bool = option(True, 'Whether its weights must be exactly those of network_r.')
    pretrain_camera_fit: Optional[str] = option(None, 'Saved camera fit (camera_fit.pth).')
    pretrain_inner_rates: Optional[str] = option(None, 'Learned step sizes of the inner loop (drtl.inner.rate_lr).')
    resume_state: Optional[str] = option(None, 'Training state to resume from; or use --auto_resume.')
    ignore_resume_networks: Any = option(None, 'Networks to leave out when resuming.')


@dataclass(frozen=True)
class TrainOptions:
    """``train``: the schedule, as in BasicSR."""

    total_iter: int = option(dataclasses.MISSING, 'Number of training steps; not for DRTLAdaptModel.', low=0)
    optim_g: dict = option(dataclasses.MISSING, "type: Adam, lr, and torch's further arguments.")
    scheduler: dict = option(dataclasses.MISSING, 'type: MultiStepLR or CosineAnnealingRestartLR, and arguments.')
    warmup_iter: int = option(-1, 'Steps over which the learning rate rises; -1: none.', low=-1)
    ema_decay: float = option(0, 'Decay of the moving average of the weights (0: none).', 0, 1)
    amp: Optional[Literal['bf16']] = option(None, 'bf16: networks compute in bfloat16, on devices that can.')
    compile: bool = option(False, 'Compile net_g by torch.compile, for training; not with maml.')
    pixel_opt: Optional[dict] = option(None, 'type of the pixel loss, and arguments.')
    perceptual_opt: Optional[dict] = option(
        None, 'type: VGGPerceptualLoss, vgg_weights: FILE, and arguments; nothing is downloaded.'
    )
    msssim_opt: Optional[dict] = option(None, 'type: MSSSIMLoss, loss_weight.')
    frequency_opt: Optional[dict] = option(None, 'type: FFTLoss, loss_weight.')
    gan_opt: Optional[dict] = option(
        None,
        'type: GANLoss, and arguments; with network_d and optim_d. All patches of a step count alike in it, whatever '
        'their task weighs.',
    )
    relativistic: bool = option(
        False, "ESRGAN's relativistic GAN loss, as in ESRGANModel; otherwise as in SRGANModel and Real-ESRGAN."
    )
    optim_d: Optional[dict] = option(None, 'type: Adam, lr, … of the discriminator, in training and in adaptation.')
    net_d_iters: int = option(1, 'Training: the discriminator takes so many steps for one of net_g.', low=1)
    net_d_init_iters: int = option(0, 'Training: so many steps of the discriminator come before those of net_g.', low=0)


@dataclass(frozen=True)
class ValOptions:
    """``val``: validation while training, or the test."""

    val_freq: int = option(dataclasses.MISSING, 'Training steps between two validations.', low=1)
    save_img: bool = option(dataclasses.MISSING, 'Whether to write the restored images.')
    suffix: Optional[str] = option(None, 'Test: suffix of the image names; default: the name of the run.')
    metrics: Optional[dict] = option(None, 'By name: type and arguments.')
    pbar: Optional[bool] = option(None, 'Show a progress bar; by default, on a terminal.')
    tile: int = option(0, 'Tile size in LQ pixels (0: the whole image at once).', low=0)
    overlap: int = option(16, 'Tile padding on each side, in LQ pixels.', low=0)


@dataclass(frozen=True)
class LoggerOptions:
    """``logger``: what is written when."""

    print_freq: int = option(dataclasses.MISSING, 'Training steps between two lines of the log.', low=1)
    save_checkpoint_freq: int = option(dataclasses.MISSING, 'Training steps between two checkpoints.', low=1)
    use_tb_logger: bool = option(dataclasses.MISSING, 'Whether to write for TensorBoard.')
    keep_checkpoints: Optional[int] = option(
        None, 'Number of latest checkpoints to keep, besides those that validated best; default: all.', low=1
    )
    wandb: Optional[dict] = option(None, 'project and resume_id, for Weights & Biases.')


@dataclass(frozen=True)
class DistOptions:
    """``dist_params``: for several processes."""

    backend: Optional[str] = option(None, 'torch.distributed backend.')
    port: Optional[int] = option(None, 'Port of the first process (SLURM).', 1, 65535)


@dataclass(frozen=True)
class FileOptions:
    """The option file."""

    name: str = option(dataclasses.MISSING, 'Name of the run, and of its folder in experiments/ or results/.')
    model_type: str = option(dataclasses.MISSING, 'DRTLModel, DRTLAdaptModel, or a model of BasicSR.')
    datasets: dict = option(dataclasses.MISSING, 'train, val (val_2, …) or test_1, ….')
    path: dict = option(dataclasses.MISSING, 'Section: where weights and states come from.')
    scale: int = option(1, 'Upscaling factor.', low=1)
    num_gpu: int = option(0, 'Must be set. Number of GPUs; auto uses one if there is one.', low=0)
    manual_seed: Optional[int] = option(None, 'Seed of all random numbers.', 0, 2**32 - 1)
    network_g: Optional[dict] = option(None, 'type of the network, and arguments.')
    network_d: Optional[dict] = option(None, 'type of the discriminator, and arguments.')
    network_r: Optional[dict] = option(None, 'type of the distortion relation network, and arguments.')
    drtl: Optional[dict] = option(None, 'Section: settings of this plug-in.')
    train: Optional[dict] = option(None, 'Section: schedule and losses.')
    val: Optional[dict] = option(None, 'Section: validation, or the test.')
    logger: Optional[dict] = option(None, 'Section: logging and checkpoints.')
    dist_params: Optional[dict] = option(None, 'Section: settings for several processes.')
    find_unused_parameters: bool = option(
        False, "BasicSR's models in several processes: as in torch. Not for DRTLModel."
    )


SECTIONS = {
    'path': PathOptions,
    'train': TrainOptions,
    'val': ValOptions,
    'logger': LoggerOptions,
    'dist_params': DistOptions,
}
# What BasicSR's parse_options adds.
COMPUTED = {
    *('dist', 'rank', 'world_size', 'auto_resume', 'is_train', 'root_path'),
    *('experiments_root', 'models', 'training_states', 'log', 'visualization', 'results_root'),
}


def check_sections(opt: dict) -> None:
    """Check the keys and values of BasicSR's own sections, and turn numbers that were written as text into numbers.

    The models of this plug-in read what is written here and nothing else. Of other models, and of datasets, a key is
    wrong if it is nearly one of these, and does not occur in their source.

    Args:
        opt (dict): Parsed options; numbers are changed in place.

    Raises:
        OptionError: Unknown key, wrong type, value out of range.
    """
    others = None
    if not is_a(MODEL_REGISTRY, opt['model_type'], 'DRTLModel'):
        others = _source_of(MODEL_REGISTRY._obj_map.get(str(opt['model_type'])))
    elif opt.get('find_unused_parameters'):
        raise OptionError(
            f'find_unused_parameters: {opt["model_type"]} averages gradients without DistributedDataParallel, so that '
            'this has no meaning; remove it.'
        )
    _check_section(FileOptions, opt, '', others)
    for name, cls in SECTIONS.items():
        if opt.get(name) is not None:
            _check_section(cls, opt[name], f'{name}.', others)
    for key, section in (opt.get('train') or {}).items():
        if key.startswith('optim_') and isinstance(section, dict) and 'lr' in section:
            section['lr'] = number(section['lr'], float, f'train.{key}.lr', 0)
    for phase, dataset in opt['datasets'].items():
        known = ('train', 'val') if opt['is_train'] else ('val', 'test')
        if phase.split('_')[0] not in known:
            raise unknown('dataset', phase, known, 'datasets')
        folder_name(dataset['name'], f'datasets.{phase}.name')
        if dataset['type'] == 'PairedImageDataset':
            source = _source_of(DATASET_REGISTRY.get('PairedImageDataset'))
            _check_section(PairedDatasetOptions, dataset, f'datasets.{phase}.', source)
    suffix = (opt.get('val') or {}).get('suffix')
    if suffix is not None:
        folder_name(f'image{suffix}', 'val.suffix')


def _check_section(cls: type, section: dict, where: str, others: Optional[str]) -> None:
    """Check a section; ``others``: source of a model that may read keys of its own."""
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key, value in section.items():
        if key in fields:
            section[key] = _convert(value, hints[key], fields[key].metadata, f'{where}{key}')
        elif key not in COMPUTED:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.7)
            if others is None or (near and not re.search(rf'[\'"]{re.escape(str(key))}[\'"]', others)):
                raise unknown('key', key, fields, where.rstrip('.') or 'option file')


def _source_of(cls: Optional[type]) -> str:
    """The source of the modules that a class and its bases are defined in."""
    modules = {sys.modules[base.__module__] for base in cls.__mro__ if base is not object} if cls else ()
    return ''.join(inspect.getsource(module) for module in modules)


def folder_name(value: Any, where: str) -> str:
    """Check that a value is the name of a folder or file, and no path that leads elsewhere.

    Raises:
        OptionError: If it is not; names ``where``.
    """
    is_name = isinstance(value, str) and Path(value).name == value and value not in ('', '.', '..')
    if not is_name or not value.isprintable():
        raise OptionError(f'{where}: expected the name of a folder, got {value!r}.')
    return value


def parse_section(cls: type, mapping: Any, where: str) -> Any:
    """Turn a section of an option file into its typed object.

    Args:
        cls (type): One of the dataclasses of this module.
        mapping (dict | None): The section; None stands for all defaults.
        where (str): Its key in the option file, for messages.

    Returns:
        An instance of ``cls``.

    Raises:
        OptionError: Unknown key (with the nearest known one), missing key, wrong type, value out of range.
    """
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, dict):
        raise OptionError(f'{where}: expected a section of keys and values, got {mapping!r}.')
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in mapping:
        if key not in fields:
            raise unknown('key', key, fields, where)
    hints = typing.get_type_hints(cls)
    values = {}
    for name, f in fields.items():
        if name in mapping:
            values[name] = _convert(mapping[name], hints[name], f.metadata, f'{where}.{name}')
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise OptionError(f'{where}.{name} is missing: {f.metadata["doc"]}')
    return cls(**values)


def _convert(value: Any, hint: Any, metadata: typing.Mapping, where: str) -> Any:
    """Check one value against its type hint and range; numbers written as strings (1e-4 in YAML) are numbers."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Union:
        return None if value is None else _convert(value, args[0], metadata, where)
    if origin is Literal:
        if value not in args:
            raise OptionError(f'{where}: {value!r} is not one of {", ".join(map(str, args))}.')
        return value
    if dataclasses.is_dataclass(hint):
        return parse_section(hint, value, where)
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise OptionError(f'{where}: expected a list, got {value!r}.')
        return [_convert(item, args[0], metadata, f'{where}[{i}]') for i, item in enumerate(value)]
    if hint in (int, float):
        return number(value, hint, where, metadata.get('low', -math.inf), metadata.get('high', math.inf))
    if not isinstance(value, hint):
        raise OptionError(f'{where}: expected {hint.__name__}, got {value!r}.')
    return value


def number(value: Any, kind: type, where: str, low: float = -math.inf, high: float = math.inf) -> Any:
    """Check that an option is a finite number of a kind (int or float) within a range, and convert it.

    Raises:
        OptionError: If it is not; names ``where``.
    """
    try:
        converted = float(value)
    except (TypeError, ValueError, OverflowError):
        converted = math.nan
    if isinstance(value, bool) or not math.isfinite(converted) or (kind is int and not converted.is_integer()):
        raise OptionError(f'{where}: expected {"a whole number" if kind is int else "a number"}, got {value!r}.')
    if not low <= converted <= high:
        bounds = f'at least {low:g}' if high == math.inf else f'between {low:g} and {high:g}'
        raise OptionError(f'{where}: {value} is out of range; it must be {bounds}.')
    return kind(converted)


class OptionLoader(yaml.SafeLoader):
    """YAML's safe loader, which runs nothing, and takes 1e-4 for a number, as YAML 1.2 and its users do."""


OptionLoader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$'), list('-+.0123456789')
)


def load_option_file(path: str) -> dict:
    """Read an option file by :class:`OptionLoader`: a ``!!python/...`` tag is an error instead of code that runs.

    Raises:
        OptionError: If the file cannot be read, is not YAML, or holds no mapping.
    """
    try:
        opt = yaml.load(Path(path).read_text(encoding='utf-8'), OptionLoader)
    except OSError as error:
        raise OptionError(f'{path}: cannot read the option file ({error.strerror}).') from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise OptionError(f'{path}: not a valid option file: {" ".join(str(error).split())}') from None
    if not isinstance(opt, dict):
        raise OptionError(f'{path}: expected an option file with keys and values.')
    return opt


def force_yml(opt: dict, entries: list[str]) -> None:
    """Apply ``--force_yml`` entries ``key:key=value`` to ``opt`` in place.

    Values are read as YAML and never evaluated; a number among the keys is an index into a list.

    Raises:
        OptionError: If an entry has no ``=``, or its section does not exist.
    """
    for entry in entries:
        path, equals, text = entry.partition('=')
        entry = ' '.join(entry.split())  # for messages of one line
        keys = [key.strip() for key in path.split(':')]
        if not equals or not all(keys):
            raise OptionError(f'--force_yml {entry}: expected key:key=value, e.g. train:ema_decay=0.999.')
        try:
            value = yaml.load(text.strip(), OptionLoader)
        except yaml.YAMLError:
            raise OptionError(f'--force_yml {entry}: {text.strip()!r} is not a YAML value.') from None
        if isinstance(value, str) and value.lower() == 'none':
            value = None
        section: Any = opt
        try:
            for key in keys[:-1]:
                section = section[_index(section, key)]
            section[_index(section, keys[-1])] = value
        except (KeyError, IndexError, TypeError, ValueError):
            raise OptionError(f'--force_yml {entry}: there is no section {":".join(keys[:-1])!r}.') from None


def _index(section: Any, key: str) -> Any:
    return int(key) if isinstance(section, list) else key


def parse_options(args: argparse.Namespace, root_path: str, is_train: bool) -> dict:
    """BasicSR's ``parse_options``, fed with a safely read option file.

    The option file and ``--force_yml`` are read here; all the rest (distributed start, seed, paths, debug mode) is
    BasicSR's own function.

    Args:
        args (argparse.Namespace): ``opt``, ``launcher``, ``auto_resume``, ``debug``, ``force_yml``.
        root_path (str): Where ``experiments/`` and ``results/`` are.
        is_train (bool): Training or testing.

    Returns:
        dict: The parsed options.

    Raises:
        OptionError: If the file is not a BasicSR option file.
    """
    opt = load_option_file(args.opt)
    force_yml(opt, args.force_yml or [])
    if is_a(MODEL_REGISTRY, opt.get('model_type'), 'DRTLAdaptModel') and is_train:
        _complete_adaptation(opt)
    _check_shape(opt, args.opt, is_train)
    _expand_home(opt)
    _fit_device(opt)
    argv = ['basicsr', '-opt', args.opt, '--launcher', args.launcher]
    argv += ['--auto_resume'] * args.auto_resume + ['--debug'] * args.debug
    starter = mock.patch.object(basicsr_options, 'init_dist', init_dist)
    loader = mock.patch.object(basicsr_options.yaml, 'load', lambda *_, **__: opt)
    with mock.patch.object(sys, 'argv', argv), starter, loader:
        parsed = basicsr_options.parse_options(root_path, is_train=is_train)[0]
    # Where the option file has no seed, each process draws its own.
    parsed['manual_seed'] = of_first_process(lambda: parsed['manual_seed'])
    set_random_seed(parsed['manual_seed'] + parsed['rank'])
    check_sections(parsed)
    train = parsed['datasets'].get('train', {})
    if _task_options(train) is not None:
        _complete_task_dataset(train, parsed)
    return parsed


def is_a(registry: Any, name: object, base: str) -> bool:
    """Whether the class that a registry of BasicSR has under a name is, or derives from, the one named ``base``."""
    return isinstance(name, str) and name in registry and issubclass(registry.get(name), registry.get(base))


def _task_options(dataset: dict) -> Optional[type]:
    """The declared options of a dataset that is, or derives from, ``DistortionTaskDataset``; None for other types."""
    is_ours = is_a(DATASET_REGISTRY, dataset.get('type'), 'DistortionTaskDataset')
    return DATASET_REGISTRY.get(dataset['type']).options_class if is_ours else None


# What BasicSR's pipelines look up without asking whether it is there.
_REQUIRED_IN_TRAINING = {
    'datasets.train': ('name', 'type', 'batch_size_per_gpu', 'num_worker_per_gpu'),
    'train': ('total_iter', 'optim_g', 'scheduler'),
    'logger': ('print_freq', 'save_checkpoint_freq', 'use_tb_logger'),
    'val': ('val_freq', 'save_img'),
}


def _check_shape(opt: dict, path: str, is_train: bool) -> None:
    """Check that the sections which every option file has are there and have what BasicSR looks up."""
    _check_tree(opt, path)
    for key in ['name', 'model_type', 'num_gpu', 'datasets', 'path'] + (['train', 'logger'] if is_train else ['val']):
        if opt.get(key) is None:
            near = difflib.get_close_matches(key, [str(k) for k in opt], n=1, cutoff=0.7)
            hint = f'; did you mean it by {near[0]!r}?' if near and near[0] != key else '.'
            raise OptionError(f'{path}: the key {key!r} is missing{hint}')
    folder_name(opt['name'], 'name')
    if opt.get('manual_seed') is not None:
        opt['manual_seed'] = number(opt['manual_seed'], int, 'manual_seed', 0, 2**32 - 1)
    if opt['num_gpu'] != 'auto':
        opt['num_gpu'] = number(opt['num_gpu'], int, 'num_gpu', 0)
    for key, value in opt.items():
        known = key in ('datasets', *SECTIONS) or str(key).startswith('network_')
        if known and value is not None and not isinstance(value, dict):
            raise OptionError(f'{key}: expected a section of keys and values, got {value!r}.')
    for phase, dataset in opt['datasets'].items():
        if not isinstance(dataset, dict) or not {'name', 'type'} <= set(dataset):
            raise OptionError(f'datasets.{phase}: expected a section with name and type.')
        for key in ('dataroot_gt', 'dataroot_lq'):
            if not isinstance(dataset.get(key), (str, type(None))):
                raise OptionError(f'datasets.{phase}.{key}: expected a folder, got {dataset[key]!r}.')
        if dataset.get('prefetch_mode') == 'cpu' and dataset.get('persistent_workers'):
            raise OptionError(
                f'datasets.{phase}.persistent_workers: with prefetch_mode: cpu, BasicSR reads from them twice at once, '
                'and the run stops; leave out one of the two.'
            )
    for key, value in opt['path'].items():
        if ('pretrain_' in key or key == 'resume_state') and not isinstance(value, (str, type(None))):
            raise OptionError(f'path.{key}: expected a file, got {value!r}.')
    logger = opt.get('logger') or {}
    if (logger.get('wandb') or {}).get('project') and logger.get('use_tb_logger') is not True:
        raise OptionError('logger.wandb: Weights & Biases wants use_tb_logger: true.')
    if is_train and 'train' not in opt['datasets']:
        raise OptionError('datasets.train is missing.')
    sections = {**opt, 'datasets.train': opt['datasets'].get('train')}
    saves_images = not is_train and opt['val'].get('save_img')
    required = _REQUIRED_IN_TRAINING if is_train else {'val': ('save_img', 'suffix') if saves_images else ('save_img',)}
    for name, keys in required.items():
        section = sections.get(name)
        for key in keys if section is not None else ():
            # The datasets of this plug-in have defaults for the loader's keys.
            if key not in section and _task_options(section) is None:
                raise OptionError(f'{name}.{key} is missing.')


# Deeper or larger than any option file, but not than one that holds itself by an alias.
_MAX_DEPTH, _MAX_VALUES = 30, 100_000


def _check_tree(opt: dict, path: str) -> None:
    """Check that keys are text, and that the file does not hold itself."""
    level: list = [opt]
    for _ in range(_MAX_DEPTH):
        values: list = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        raise OptionError(f'{path}: the key {key!r} is no text; put it in quotes, or remove it.')
                values += item.values()
            elif isinstance(item, list):
                values += item
        if len(values) > _MAX_VALUES:
            break
        level = values
        if not level:
            return
    raise OptionError(f'{path}: sections are nested too deeply or too large; does one hold itself by an alias (*)?')


_NOT_OF_ADAPTATION = {
    *('total_iter', 'optim_g', 'scheduler', 'ema_decay', 'warmup_iter', 'net_d_iters', 'net_d_init_iters')
}


def _complete_adaptation(opt: dict) -> None:
    """Give BasicSR's training pipeline a schedule without iterations."""
    train = opt.setdefault('train', {})
    if isinstance(train, dict):
        unread = sorted(set(train) & _NOT_OF_ADAPTATION)
        if unread:
            raise OptionError(f'train.{unread[0]}: DRTLAdaptModel does not train; its settings are in drtl.adapt.')
        schedule = {'type': 'MultiStepLR', 'milestones': [1], 'gamma': 1}
        train.update(total_iter=0, optim_g={'type': 'Adam', 'lr': 0.0}, scheduler=schedule)
    opt['logger'] = {'print_freq': 1, 'save_checkpoint_freq': 1, 'use_tb_logger': False, **(opt.get('logger') or {})}
    if isinstance(opt.get('val'), dict):
        opt['val'] = {'val_freq': 1, 'save_img': False, **opt['val']}


def _complete_task_dataset(train: dict, opt: dict) -> None:
    """Give BasicSR's loader the defaults, and numbers for numbers, of a DistortionTaskDataset's options."""
    train.setdefault('seed', opt['manual_seed'])
    train['camera_fit'] = DRTLOptions.from_opt(opt).camera_fit and train.get('target') is not None
    options = parse_section(_task_options(train), train, 'datasets.train')
    train.update({key: value for key, value in vars(options).items() if key != 'target'})
    if opt['is_train'] and not opt['dist'] and opt['num_gpu'] > 1:
        if not is_a(MODEL_REGISTRY, opt['model_type'], 'DRTLAdaptModel'):  # for which one is enough
            print(
                f'num_gpu {opt["num_gpu"]} becomes 1, since each GPU wants a process of its own: '
                f'torchrun --nproc_per_node={opt["num_gpu"]} -m drtl_plugin train -opt … --launcher pytorch.',
                file=sys.stderr,
            )
        opt['num_gpu'] = 1


def _expand_home(opt: dict) -> None:
    """Expand ``~`` in all files and folders of ``path`` and ``datasets``; BasicSR expands it in some of them."""
    sections = [(opt['path'], [key for key in opt['path'] if key.startswith('pretrain_') or key == 'resume_state'])]
    for dataset in opt['datasets'].values():
        for section in (dataset, dataset.get('target')):
            if isinstance(section, dict):
                sections.append((section, ['dataroot_gt', 'dataroot_lq', 'meta_info_file']))
    for section, keys in sections:
        for key in keys:
            if isinstance(section.get(key), str):
                section[key] = os.path.expanduser(section[key])


def _fit_device(opt: dict) -> None:
    """Let an option file that was written for GPUs run where there is none."""
    if torch.cuda.is_available():
        return
    if opt['num_gpu'] not in (0, 'auto'):
        print(f'No GPU found: num_gpu {opt["num_gpu"]} becomes 0.', file=sys.stderr)
        opt['num_gpu'] = 0
    for dataset in opt['datasets'].values():
        if isinstance(dataset, dict) and dataset.get('prefetch_mode') == 'cuda':
            dataset.update(prefetch_mode='cpu', persistent_workers=False)
