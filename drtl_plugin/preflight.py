"""Checks before a run writes anything: the names, options and data that the option file refers to."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import basicsr.losses
import basicsr.metrics  # noqa: F401  fills METRIC_REGISTRY
import numpy as np
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.data.realesrgan_paired_dataset import RealESRGANPairedDataset
from basicsr.data.single_image_dataset import SingleImageDataset
from basicsr.models.base_model import BaseModel
from basicsr.utils import FileClient
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY
from torch.utils.data import Dataset

from drtl_plugin.compat.basicsr import close_basicsr_logs, quiet_basicsr_log, without_gpu
from drtl_plugin.data.distortion_task_dataset import DistortionTaskDataset
from drtl_plugin.data.image_files import (
    check_lmdb,
    check_pair_sizes,
    check_paired_keys,
    image_size,
    names_of_list,
    require,
)
from drtl_plugin.data.interface import missing_members
from drtl_plugin.errors import DataError, DRTLError, OptionError, describe, own_line, registered, unknown
from drtl_plugin.hooks import RelationHook
from drtl_plugin.hooks.base import build_hooks
from drtl_plugin.hooks.relation_hook import find_estimator
from drtl_plugin.metrics import calculate_pyiqa, check_pyiqa
from drtl_plugin.models import DRTLModel
from drtl_plugin.options.convert import number
from drtl_plugin.options.parse import COMPUTED_PATHS
from drtl_plugin.options.sections import DRTLOptions
from drtl_plugin.relation.estimators import needs_drn, needs_trained_network, shipped_drn
from drtl_plugin.runtime import checkpoints
from drtl_plugin.runtime.distributed import of_first_process

# Classes that BasicSR's models build by name, without a registry.
_OPTIMIZERS = ('Adam',)
_SCHEDULERS = ('MultiStepLR', 'MultiStepRestartLR', 'CosineAnnealingRestartLR')
# Datasets that read LQ and GT from LMDBs under the same keys.
_PAIRED = (PairedImageDataset, RealESRGANPairedDataset)
# Side in pixels of the image that the rehearsal restores; a multiple of the windows of common networks.
_SIZE = 32


def check(opt: dict) -> dict[str, Dataset]:
    """Check parsed options, build the datasets, and rehearse the model.

    Args:
        opt (dict): Returned by :func:`drtl_plugin.options.parse.parse_options`. Not changed.

    Returns:
        dict[str, Dataset]: The dataset of each phase (``train``, ``val``, ``val_2``, …), for the run to use.

    Raises:
        OptionError: Unregistered name, unknown argument of a network or metric, invalid value.
        DataError: Missing folder or file, or pairs that don't fit.
    """
    model = registered(MODEL_REGISTRY, opt['model_type'], 'model', 'model_type')
    for key in opt:
        if key.startswith('network_') and opt[key] is not None:
            _check_network(opt[key], key)
    for key, section in (opt.get('train') or {}).items():
        if key.endswith('_opt') and isinstance(section, dict):
            registered(LOSS_REGISTRY, section.get('type'), 'loss', f'train.{key}.type')
    for name, metric in ((opt.get('val') or {}).get('metrics') or {}).items():
        _check_metric(metric, f'val.metrics.{name}')
    for key, path in opt['path'].items():
        if (key.startswith('pretrain_') or key == 'resume_state') and path and not Path(path).is_file():
            raise DataError(f'path.{key}: there is no file {path}; train it first, or name another.')
        if key.startswith('pretrain_network_') and path:
            checkpoints.read(path, f'path.{key}')
    if ((opt.get('logger') or {}).get('wandb') or {}).get('project') and importlib.util.find_spec('wandb') is None:
        raise OptionError('logger.wandb: wandb is missing; pip install wandb, or remove this section.')
    if opt['is_train']:
        _check_schedule(opt['train'], 1 if getattr(model, 'takes_steps', True) else 0)
        if model.get_optimizer is BaseModel.get_optimizer and model.setup_schedulers is BaseModel.setup_schedulers:
            for key, section in opt['train'].items():
                if key == 'scheduler' or (key.startswith('optim_') and section is not None):
                    known = _SCHEDULERS if key == 'scheduler' else _OPTIMIZERS
                    if section.get('type') not in known:
                        raise unknown(key.split('_')[0], section.get('type'), known, f'train.{key}.type')
    datasets = {
        phase: _build_dataset(dataset_opt, f'datasets.{phase}') for phase, dataset_opt in opt['datasets'].items()
    }
    if issubclass(model, DRTLModel):
        _check_drtl(opt, datasets.get('train'))
    _rehearse(model, opt, datasets.get('train'))
    return datasets


def check_archiving(opt: dict, option_file: str, folder: str | Path) -> None:
    """Check that a run reads nothing from its own folder, which a new run of this name archives by renaming it.

    Args:
        opt (dict): Returned by :func:`drtl_plugin.options.parse.parse_options`.
        option_file (str): The option file.
        folder (str | Path): The folder of the run, in experiments/ or results/.

    Raises:
        DataError: If the option file, or a file or folder that it names, is in that folder.
    """
    opt = {**opt, 'path': {key: value for key, value in opt['path'].items() if key not in COMPUTED_PATHS}}
    for key, text in (('-opt', option_file), *_texts(opt)):
        is_inside = any(
            Path(place(text)).is_relative_to(place(folder)) for place in (os.path.abspath, os.path.realpath)
        )
        if is_inside and os.path.exists(text):
            raise DataError(
                f'{key}: {text} is in {os.path.relpath(folder)}, which a new run named {opt["name"]} would archive; '
                'choose another name (--force_yml name=…) or move it.'
            )


def _texts(section: dict | list, where: str = '') -> Iterator[tuple[str, str]]:
    """All strings of an option section, with their keys."""
    for key, value in section.items() if isinstance(section, dict) else enumerate(section):
        place = f'{where}[{key}]' if isinstance(section, list) else f'{where}.{key}'.lstrip('.')
        if isinstance(value, (dict, list)):
            yield from _texts(value, place)
        elif isinstance(value, str) and '\0' not in value:
            yield place, value


def _rehearse(model_class: type, opt: dict, train_set: Any) -> None:
    """Build the model once, and restore a small image with it, without leaving a trace.

    This finds faults that have no check of their own: missing options, weights that don't fit the network, a network
    for another scale.
    """
    random_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with (
            quiet_basicsr_log(logging.CRITICAL),
            torch.random.fork_rng(),
            contextlib.redirect_stdout(None),
            without_gpu(),
        ):
            model = model_class({**deepcopy(opt), 'dist': False, 'num_gpu': min(opt['num_gpu'], 1)})
            if isinstance(model, DRTLModel):
                model.feed_data({'lq': torch.rand(1, 3, _SIZE, _SIZE)})
                model.test()
                height, scale = model.output.shape[-2], opt.get('scale', 1)
                if height != _SIZE * scale:
                    raise OptionError(f'network_g enlarges {height / _SIZE:g} times, but scale is {scale}.')
                if opt['is_train']:
                    model.train_set = train_set
                    model.check_data()
    except DRTLError:
        raise
    except Exception as error:
        place = own_line(error)
        if isinstance(error, KeyError) and not place:
            raise OptionError(f'{opt["model_type"]} needs the option {error}, which is missing.') from error
        raise OptionError(f'{opt["model_type"]} cannot be built: {describe(error)}{place}') from error
    finally:
        close_basicsr_logs()
        random.setstate(random_state)
        np.random.set_state(numpy_state)


def _check_metric(metric: object, where: str) -> None:
    if not isinstance(metric, dict):
        raise OptionError(f'{where}: expected a section with type, got {metric!r}.')
    function = registered(METRIC_REGISTRY, metric.get('type'), 'metric', f'{where}.type')
    if metric.get('better', 'higher') not in ('higher', 'lower'):
        raise OptionError(f'{where}.better: {metric["better"]!r} is not one of higher, lower.')
    parameters = inspect.signature(function).parameters.values()
    # BasicSR's metrics ignore further keyword arguments; metrics from elsewhere may read them.
    swallows = any(p.kind is p.VAR_KEYWORD for p in parameters) and not function.__module__.startswith('basicsr.')
    known = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in known if p.name not in ('img', 'img1', 'img2')]
    for key in metric:
        if key not in ('type', 'better', *names) and not swallows:
            raise unknown(f'argument of {metric["type"]}', key, names, where)
    for parameter in known:
        if parameter.name in names and parameter.default is parameter.empty and parameter.name not in metric:
            raise OptionError(f'{where}: {metric["type"]} needs {parameter.name}.')
    if function is calculate_pyiqa:
        check_pyiqa(metric, where)


def _check_schedule(train_opt: dict, fewest: int) -> None:
    total_iter = number(train_opt['total_iter'], int, 'train.total_iter', fewest)
    periods = (train_opt.get('scheduler') or {}).get('periods')
    if isinstance(periods, list):
        periods = [number(period, int, 'train.scheduler.periods', 1) for period in periods]
    if isinstance(periods, list) and sum(periods) < total_iter:
        raise OptionError(f'train.scheduler.periods: {periods} end before total_iter {total_iter}; extend them.')


def _check_network(network_opt: dict, where: str) -> None:
    network = registered(ARCH_REGISTRY, network_opt.get('type'), 'network', f'{where}.type')
    parameters = inspect.signature(network).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in network_opt:
        if key != 'type' and key not in parameters:
            raise unknown(f'argument of {network_opt["type"]}', key, parameters, where)
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in network_opt]
    if missing:
        raise OptionError(f'{where}: {network_opt["type"]} needs {", ".join(missing)}.')


def _build_dataset(dataset_opt: dict, where: str) -> Dataset:
    """Check the options of a dataset, build it, and check the images of those types that we know."""
    kind = registered(DATASET_REGISTRY, dataset_opt.get('type'), 'dataset', f'{where}.type')
    for section, place in ((dataset_opt, where), (dataset_opt.get('target') or {}, f'{where}.target')):
        backend = section.get('io_backend')
        if backend is not None and (not isinstance(backend, dict) or backend.get('type') not in FileClient._backends):
            raise OptionError(
                f'{place}.io_backend: expected a type of {", ".join(FileClient._backends)}, got {backend!r}.'
            )
    for section, place in ((dataset_opt, where), (dataset_opt.get('target') or {}, f'{where}.target')):
        is_lmdb = (section.get('io_backend') or {}).get('type') == 'lmdb'
        for key in ('dataroot_gt', 'dataroot_lq'):
            if section.get(key) is not None:
                (check_lmdb if is_lmdb else require)(section[key], f'{place}.{key}')
        lq, gt = section.get('dataroot_lq'), section.get('dataroot_gt')
        if is_lmdb and lq and gt and (section is not dataset_opt or issubclass(kind, _PAIRED)):
            check_paired_keys(lq, gt, place)
        if section.get('meta_info_file') is not None:
            names_of_list(section['meta_info_file'], f'{place}.meta_info_file')
    try:
        dataset = kind(deepcopy(dataset_opt))
        if isinstance(dataset, (PairedImageDataset, SingleImageDataset)) and len(dataset) == 0:
            raise DataError(f'{where}.dataroot_lq: {dataset_opt["dataroot_lq"]} contains no images.')
        of_first_process(lambda: _check_images(dataset, dataset_opt))
    except DRTLError:
        raise
    except Exception as error:
        place = own_line(error)
        if isinstance(error, KeyError) and not place:
            raise OptionError(f'{where}.{error.args[0]} is missing.') from error
        if isinstance(error, (AssertionError, ValueError, OSError)) and not place:
            raise DataError(f'{where}: {" ".join(str(error).split())}') from error
        raise OptionError(f'{where}: {dataset_opt["type"]} cannot be built: {describe(error)}{place}') from error
    return dataset


def _check_images(dataset: Dataset, dataset_opt: dict) -> None:
    """Check the images of a dataset, as far as possible within seconds."""
    if isinstance(dataset, PairedImageDataset):
        check_pair_sizes(dataset)
    elif isinstance(dataset, SingleImageDataset):
        if dataset_opt['io_backend']['type'] == 'disk':
            for path in dataset.paths:
                image_size(path)
    elif isinstance(dataset, DistortionTaskDataset):
        dataset.check_image_sizes()


def _check_drtl(opt: dict, train_set: Any) -> None:
    """Check the ``drtl`` section against the dataset of ``datasets.train``."""
    drtl = DRTLOptions.from_opt(opt)
    find_estimator(drtl.weighting.relation)
    hooks = build_hooks(drtl.hooks)
    if opt.get('network_g') is None:
        raise OptionError('network_g is missing.')
    if not opt['is_train']:
        return
    train = opt['datasets']['train']
    lacking = missing_members(train_set)
    if lacking:
        raise OptionError(
            f'datasets.train.type: DRTLModel trains on DistortionTaskDataset, not {train["type"]}, which lacks '
            f'{", ".join(lacking)}.'
        )
    relation = drtl.weighting.relation
    lacks_drn = needs_drn(relation) and shipped_drn(relation) is None and opt.get('network_r') is None
    if lacks_drn and train.get('target'):
        raise OptionError(f'network_r is missing: drtl.weighting.relation {relation!r} needs a DRN.')
    waits = needs_trained_network(relation) and not opt['path'].get('pretrain_network_g')
    interval = next(hook.interval for hook in hooks if isinstance(hook, RelationHook))
    if train.get('target') and waits and 0 < opt['train']['total_iter'] <= interval:
        raise OptionError(
            f'drtl.hooks: the relation would first be measured at iteration {interval}, but total_iter is '
            f'{opt["train"]["total_iter"]}; set a shorter interval for RelationHook.'
        )
    if train.get('target') and drtl.weighting.relation != 'uniform' and drtl.weighting.temperature is None:
        num = len(train_set.library) + drtl.camera_fit
        wanted = drtl.weighting.effective_tasks
        if wanted >= num:
            raise OptionError(
                f'drtl.weighting.effective_tasks: {wanted:g} of {num} tasks means equal weights; '
                'lower it, or set relation: uniform.'
            )
