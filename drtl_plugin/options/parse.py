"""Parses a BasicSR option file into checked options."""

from __future__ import annotations

import argparse
import difflib
import random
import re
import sys
from os import path as osp
from pathlib import Path
from typing import Any

import msgspec
import torch
from basicsr.utils import set_random_seed
from basicsr.utils.dist_util import get_dist_info
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from drtl_plugin.compat.distributed import init_dist
from drtl_plugin.errors import OptionError, unknown
from drtl_plugin.options.basicsr import SECTIONS, FileOptions, PairedDatasetOptions, ValOptions
from drtl_plugin.options.convert import Section, convert, declared, missing, number, parse_section, unknown_key
from drtl_plugin.options.file import check_tree, force_yml, load_option_file
from drtl_plugin.options.sections import DRTLOptions
from drtl_plugin.runtime import checkpoints, device
from drtl_plugin.runtime.distributed import of_first_process
from drtl_plugin.runtime.recognition import SPANDREL_NETWORK, recognise, spandrel_options

# Keys of ``path`` that parse_options adds.
COMPUTED_PATHS = frozenset({'experiments_root', 'models', 'training_states', 'log', 'visualization', 'results_root'})
# All keys that parse_options and the run add, by section; values in the option file are ignored.
_COMPUTED = {
    '': frozenset({'dist', 'rank', 'world_size', 'auto_resume', 'is_train', 'root_path'}),
    'path': COMPUTED_PATHS,
}
# Keys that models may have for each of their networks.
_OF_A_NETWORK = ('network_', 'pretrain_', 'strict_load_', 'param_key_', 'optim_')
_NOT_OF_ADAPTATION = frozenset(
    {'total_iter', 'optim_g', 'scheduler', 'ema_decay', 'warmup_iter', 'net_d_iters', 'net_d_init_iters'}
)


def parse_options(args: argparse.Namespace, root_path: str, is_train: bool) -> dict[str, Any]:
    """Read and check an option file, and return what BasicSR's ``parse_options`` returns for it.

    In addition, it fills in defaults of the training dataset, expands ``~`` in all paths, and lets files written for
    GPUs run without one.

    Args:
        args (argparse.Namespace): ``opt``, ``launcher``, ``auto_resume``, ``debug``, ``force_yml``.
        root_path (str): Parent of ``experiments/`` and ``results/``.
        is_train (bool): Training or testing.

    Raises:
        OptionError: If the file is not a valid option file; names the key.
    """
    opt = load_option_file(args.opt)
    force_yml(opt, args.force_yml or [])
    check_tree(opt, args.opt)
    if is_train and not _takes_steps(opt.get('model_type')):
        _complete_adaptation(opt)
    check_options(opt, args.opt, is_train)
    _expand_home(opt)
    _complete_spandrel_network(opt)
    _start_processes(opt, args.launcher)
    opt.update(auto_resume=args.auto_resume, is_train=is_train)
    if args.debug and not opt['name'].startswith('debug'):
        opt['name'] = f'debug_{opt["name"]}'
    for phase, dataset in opt['datasets'].items():
        dataset['phase'] = phase.split('_')[0]
        if 'scale' in opt:
            dataset['scale'] = opt['scale']
    _add_folders(opt, root_path)
    if is_train and 'debug' in opt['name']:
        opt['logger'].update(print_freq=1, save_checkpoint_freq=8)
        if 'val' in opt:
            opt['val']['val_freq'] = 8
    _complete_task_dataset(opt)
    _fit_devices(opt)
    return opt


def is_a(registry: Any, name: object, base: str) -> bool:
    """Whether the class that a BasicSR registry has under ``name`` is, or derives from, the one named ``base``."""
    return isinstance(name, str) and name in registry and issubclass(registry.get(name), registry.get(base))


def _takes_steps(model_type: object) -> bool:
    """Whether a model trains: all do but those whose class says ``takes_steps = False``."""
    if not isinstance(model_type, str) or model_type not in MODEL_REGISTRY:
        return True
    return getattr(MODEL_REGISTRY.get(model_type), 'takes_steps', True)


def folder_name(value: Any, where: str) -> str:
    """Check that a value is the name of a folder or file, and not a path that leads elsewhere.

    Raises:
        OptionError: If it is not; names ``where``.
    """
    is_name = isinstance(value, str) and Path(value).name == value and value not in ('', '.', '..')
    if not is_name or not value.isprintable():
        raise OptionError(f'{where}: expected the name of a folder, got {value!r}.')
    return str(value)


def check_options(opt: dict[str, Any], path: str, is_train: bool) -> None:
    """Check the sections that BasicSR's models share with ours, and the datasets.

    Sections of DRTLModel and its subclasses admit declared keys only. Other models may read keys of their own, so
    there only a key that looks like a misspelt declared one is an error.

    Args:
        opt (dict): Options as read; values are converted in place, e.g. ``'1e-4'`` to a number.
        path (str): The option file, for error messages.
        is_train (bool): Training or testing.

    Raises:
        OptionError: Missing or unknown key, wrong type, value out of range.
    """
    _check_presence(opt, path, is_train)
    is_ours = is_a(MODEL_REGISTRY, opt['model_type'], 'DRTLModel')
    folder_name(opt['name'], 'name')
    _check_section(FileOptions, opt, '', is_ours)
    if is_ours:
        DRTLOptions.from_opt(opt)
    if is_ours and opt.get('find_unused_parameters'):
        raise OptionError(
            f'find_unused_parameters: {opt["model_type"]} averages gradients without DistributedDataParallel; '
            'remove this key.'
        )
    for key, value in opt.items():
        if key.startswith('network_') and not isinstance(value, (dict, type(None))):
            raise OptionError(f'{key}: expected a section of keys and values, got {value!r}.')
    for name, cls in SECTIONS.items():
        if opt.get(name) is not None:
            _check_section(cls, opt[name], name, is_ours)
    for key, value in opt['path'].items():
        if 'pretrain_' in key and not isinstance(value, (str, type(None))):
            raise OptionError(f'path.{key}: expected a file, got {value!r}.')
    for key, section in (opt.get('train') or {}).items():
        if key.startswith('optim_') and isinstance(section, dict) and 'lr' in section:
            section['lr'] = number(section['lr'], float, f'train.{key}.lr', 0)
    for phase, dataset in opt['datasets'].items():
        _check_dataset(phase, dataset, is_train)
    logger = opt.get('logger') or {}
    if (logger.get('wandb') or {}).get('project') and logger.get('use_tb_logger') is not True:
        raise OptionError('logger.wandb: Weights & Biases requires use_tb_logger: true.')
    _check_required(opt, is_train)
    suffix = (opt.get('val') or {}).get('suffix')
    if suffix is not None:
        folder_name(f'image{suffix}', 'val.suffix')


def _check_presence(opt: dict[str, Any], path: str, is_train: bool) -> None:
    for key in ['name', 'model_type', 'num_gpu', 'datasets', 'path', *(['train', 'logger'] if is_train else ['val'])]:
        if opt.get(key) is None:
            near = difflib.get_close_matches(key, opt, n=1, cutoff=0.7)
            hint = f'; is {near[0]!r} a misspelling of it?' if near and near[0] != key else '.'
            raise OptionError(f'{path}: the key {key!r} is missing{hint}')
    if is_train and isinstance(opt['datasets'], dict) and 'train' not in opt['datasets']:
        raise OptionError('datasets.train is missing.')


def _check_required(opt: dict[str, Any], is_train: bool) -> None:
    """Check that the keys that BasicSR's pipelines look up are present."""
    required: dict[str, tuple[type[Section], tuple[str, ...]]] = {}
    if is_train:
        required = {name: (SECTIONS[name], ()) for name in ('train', 'logger', 'val')}
        if _options_class(opt['datasets']['train']) is None:  # others have defaults
            required['datasets.train'] = (PairedDatasetOptions, ('batch_size_per_gpu', 'num_worker_per_gpu'))
    else:
        required['val'] = (ValOptions, ('save_img', 'suffix') if opt['val'].get('save_img') else ('save_img',))
    for name, (cls, keys) in required.items():
        section = opt['datasets']['train'] if name == 'datasets.train' else opt.get(name)
        fields = declared(cls)
        for key in keys or [key for key, field in fields.items() if field.required]:
            if section is not None and key not in section:
                raise missing(fields[key], name)


def _check_section(cls: type[Section], section: Any, where: str, is_closed: bool) -> None:
    """Convert the values of a section in place.

    Args:
        cls (type): Its declaration. Required keys may be missing, since a test needs fewer than training.
        section: The section; anything but a dict is invalid.
        where (str): Its key in the option file.
        is_closed (bool): Whether only declared (and computed) keys are valid; otherwise, all but misspelt ones are.
    """
    fields = declared(cls)
    for key, value in section.items():
        if key in fields:
            section[key] = convert(value, fields[key].type, f'{where}.{key}'.lstrip('.'))
        elif key in _COMPUTED.get(where, ()):
            continue
        elif is_closed or key in cls.removed or _is_misspelt(key, list(fields)):
            raise unknown_key(cls, key, where)


def _is_misspelt(key: str, known: list[str]) -> bool:
    """Whether an unknown key is probably a misspelt known one, and not another key that a model may read."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
    return bool(near) and not key.startswith(_OF_A_NETWORK) and not re.match(rf'{near[0]}[_\d]', key)


def _check_dataset(phase: str, dataset: Any, is_train: bool) -> None:
    where = f'datasets.{phase}'
    known = ('train', 'val') if is_train else ('val', 'test')
    if phase.split('_')[0] not in known:
        raise unknown('dataset', phase, known, 'datasets')
    if not isinstance(dataset, dict) or not {'name', 'type'} <= set(dataset):
        raise OptionError(f'{where}: expected a section with name and type.')
    folder_name(dataset['name'], f'{where}.name')
    for key in ('dataroot_gt', 'dataroot_lq'):
        if not isinstance(dataset.get(key), (str, type(None))):
            raise OptionError(f'{where}.{key}: expected a folder, got {dataset[key]!r}.')
    if dataset['type'] == 'PairedImageDataset':
        _check_section(PairedDatasetOptions, dataset, where, is_closed=False)
    if dataset.get('prefetch_mode') == 'cpu' and dataset.get('persistent_workers'):
        raise OptionError(
            f'{where}.persistent_workers: with prefetch_mode: cpu, BasicSR iterates over the same workers twice and '
            'the run stops; remove one of the two.'
        )


def _options_class(dataset: dict[str, Any]) -> type[Section] | None:
    """The section that a registered dataset class declares as its ``options_class``; None for other types.

    Raises:
        OptionError: If it declares something else, e.g. a dataclass.
    """
    kind = dataset.get('type')
    if not isinstance(kind, str) or kind not in DATASET_REGISTRY:
        return None
    options_class = getattr(DATASET_REGISTRY.get(kind), 'options_class', None)
    if options_class is not None and not (isinstance(options_class, type) and issubclass(options_class, Section)):
        raise OptionError(
            f'datasets.train.type: options_class of {kind} must derive from drtl_plugin.options.convert.Section, as '
            f'drtl_plugin.options.sections.TaskDatasetOptions does; it is {options_class!r}.'
        )
    return options_class


def _complete_spandrel_network(opt: dict[str, Any]) -> None:
    """Fill in checkpoint and window size of a network that spandrel recognises.

    Raises:
        OptionError: If no checkpoint is named, or spandrel does not recognise it.
        DataError: If it cannot be read.
    """
    network = opt.get('network_g')
    if not isinstance(network, dict) or network.get('type') != SPANDREL_NETWORK or 'window_size' in network:
        return
    checkpoint = network.get('checkpoint') or opt['path'].get('pretrain_network_g')
    if not isinstance(checkpoint, str):
        raise OptionError('network_g.checkpoint is missing: it names a file of weights that spandrel recognises.')
    checkpoint = str(Path(checkpoint).expanduser())
    found = recognise(checkpoints.read(checkpoint, 'network_g.checkpoint'), f'network_g.checkpoint: {checkpoint}')
    if found is None:
        raise OptionError(f'network_g.checkpoint: spandrel does not recognise {checkpoint}; give type and arguments.')
    network.update(spandrel_options(checkpoint, found.window))


def _complete_adaptation(opt: dict[str, Any]) -> None:
    """Give BasicSR's training pipeline a schedule without iterations."""
    train = opt.setdefault('train', {})
    if isinstance(train, dict):
        unread = sorted(set(train) & _NOT_OF_ADAPTATION)
        if unread:
            raise OptionError(f'train.{unread[0]}: {opt["model_type"]} does not train; its settings are in drtl.adapt.')
        schedule = {'type': 'MultiStepLR', 'milestones': [1], 'gamma': 1}
        train.update(total_iter=0, optim_g={'type': 'Adam', 'lr': 0.0}, scheduler=schedule)
    opt['logger'] = {'print_freq': 1, 'save_checkpoint_freq': 1, 'use_tb_logger': False, **(opt.get('logger') or {})}
    if isinstance(opt.get('val'), dict):
        opt['val'] = {'val_freq': 1, 'save_img': False, **opt['val']}


def _expand_home(opt: dict[str, Any]) -> None:
    """Expand ``~`` in all files and folders of ``path`` and ``datasets``; BasicSR expands it in some of them."""
    sections = [(opt['path'], [key for key in opt['path'] if 'pretrain_' in key or key == 'resume_state'])]
    for dataset in opt['datasets'].values():
        for section in (dataset, dataset.get('target')):
            if isinstance(section, dict):
                sections.append((section, ['dataroot_gt', 'dataroot_lq', 'meta_info_file']))
    for section, keys in sections:
        for key in keys:
            if isinstance(section.get(key), str):
                section[key] = osp.expanduser(section[key])


def _start_processes(opt: dict[str, Any], launcher: str) -> None:
    """Join the other processes, if there are any, and seed this one."""
    opt['dist'] = launcher != 'none'
    if opt['dist']:
        init_dist(launcher, **(opt.get('dist_params') or {} if launcher == 'slurm' else {}))
    opt['rank'], opt['world_size'] = get_dist_info()
    if opt.get('manual_seed') is None:
        opt['manual_seed'] = of_first_process(lambda: random.randint(1, 10000))
    set_random_seed(opt['manual_seed'] + opt['rank'])
    if opt['num_gpu'] == 'auto':
        opt['num_gpu'] = torch.cuda.device_count()


def _add_folders(opt: dict[str, Any], root_path: str) -> None:
    """Add the folders that a run writes to, in BasicSR's order."""
    is_train = opt['is_train']
    root = osp.join(root_path, 'experiments' if is_train else 'results', opt['name'])
    path = opt['path']
    path['experiments_root' if is_train else 'results_root'] = root
    if is_train:
        path.update(models=osp.join(root, 'models'), training_states=osp.join(root, 'training_states'))
    path.update(log=root, visualization=osp.join(root, 'visualization'))


def _complete_task_dataset(opt: dict[str, Any]) -> None:
    """Add the defaults of a dataset that declares its options, for BasicSR's loader."""
    train = opt['datasets'].get('train', {})
    options_class = _options_class(train)
    if options_class is None:
        return
    if 'seed' in declared(options_class):
        train.setdefault('seed', opt['manual_seed'])
    options = parse_section(options_class, train, 'datasets.train')
    values = msgspec.structs.asdict(options)
    train.update({name: value for name, value in values.items() if not isinstance(value, msgspec.Struct)})


def _fit_devices(opt: dict[str, Any]) -> None:
    """Let an option file that was written for several GPUs run on one, or on the CPU if there is none."""
    chosen = device.chosen()
    if chosen is not None:
        if chosen.index is not None and opt['dist']:
            raise OptionError(f'--device {chosen}: each of several processes has a GPU of its own; use --device cuda.')
        # BasicSR counts CUDA's GPUs only.
        num_gpu = 0 if chosen.type != 'cuda' else 1 if chosen.index is not None else max(opt['num_gpu'], 1)
        if opt['num_gpu'] != num_gpu:
            print(f'--device {chosen}: num_gpu {opt["num_gpu"]} becomes {num_gpu}.', file=sys.stderr)
            opt['num_gpu'] = num_gpu
    if device.current().type != 'cuda':
        if opt['num_gpu'] != 0:
            print(f'No GPU found: num_gpu {opt["num_gpu"]} becomes 0.', file=sys.stderr)
            opt['num_gpu'] = 0
        for dataset in opt['datasets'].values():
            if dataset.get('prefetch_mode') == 'cuda':
                dataset.update(prefetch_mode='cpu', persistent_workers=False)
    model_type = opt['model_type']
    if opt['is_train'] and not opt['dist'] and opt['num_gpu'] > 1 and is_a(MODEL_REGISTRY, model_type, 'DRTLModel'):
        if _takes_steps(model_type):  # adaptation needs only one
            print(
                f'num_gpu {opt["num_gpu"]} becomes 1, since each GPU needs a process of its own: '
                f'torchrun --nproc_per_node={opt["num_gpu"]} -m drtl_plugin train -opt … --launcher pytorch.',
                file=sys.stderr,
            )
        opt['num_gpu'] = 1
