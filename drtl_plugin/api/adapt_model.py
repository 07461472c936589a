"""The option file of an adaptation, and the models built from it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from basicsr.models import build_model
from torch import nn

from drtl_plugin.api.adapt_pairs import Pair
from drtl_plugin.data.image_files import image_names, image_size
from drtl_plugin.data.interface import EpisodeDataset
from drtl_plugin.models.drtl_model import DRTLModel
from drtl_plugin.runtime.trained_network import TrainedNetwork

# Side of the LQ patches, where the images are large enough.
_LQ_SIZE = 48
# Patch sides must be multiples of this for a U-Net discriminator, which halves them three times.
_HALVED = 8


def adaptation_options(
    network: TrainedNetwork,
    weights: str,
    images: Mapping[str, Pair],
    target: Path,
    auxiliary: str | None,
    steps: int,
    losses: Mapping[str, dict],
) -> dict:
    """The option file of an adaptation.

    Args:
        network (TrainedNetwork): The network to adapt.
        weights (str): Its file.
        images (Mapping[str, Pair]): The pairs, by name.
        target (Path): Folder whose ``pairs/gt`` and ``pairs/lq`` hold the pairs.
        auxiliary (str | None): Folder of GT images for the auxiliary tasks; None: those of the pairs.
        steps (int): Adaptation steps.
        losses (Mapping[str, dict]): ``train``, ``path`` and possibly ``network_d``, for the losses.
    """
    scale = network.scale
    pairs = target.absolute() / 'pairs'
    auxiliary_gt = pairs / 'gt' if auxiliary is None else Path(auxiliary).absolute()
    sizes = [image_size(str(auxiliary_gt / name)) for name in image_names(str(auxiliary_gt), '--auxiliary')]
    multiple = scale
    if 'network_d' in losses:
        multiple = math.lcm(scale, _HALVED)
        sizes += [gt.shape[:2] for gt, _ in images.values()]
    gt_size = min(_LQ_SIZE * scale, min(min(size) for size in sizes)) // multiple * multiple
    return {
        'name': _free_name(target.absolute().name),
        'model_type': 'DRTLAdaptModel',
        'scale': scale,
        'num_gpu': 'auto',
        'manual_seed': 0,
        'datasets': {
            'train': {
                'name': 'auxiliary tasks',
                'type': 'DistortionTaskDataset',
                'dataroot_gt': str(auxiliary_gt),
                'io_backend': {'type': 'disk'},
                'gt_size': gt_size,
                'distortions': 'default',
                'target': {
                    'dataroot_gt': str(pairs / 'gt'),
                    'dataroot_lq': str(pairs / 'lq'),
                    'names': list(images),
                },
            }
        },
        'network_g': network.options,
        'drtl': {
            'weighting': {'relation': 'transfer', 'effective_tasks': 6, 'floor': 0.2},
            'adapt': {'steps': steps, 'lr': 3e-4, 'batch_size': 8, 'replay': 0.5},
        },
        'path': {
            'pretrain_network_g': str(Path(weights).absolute()),
            'param_key_g': network.param_key,
            'strict_load_g': True,
            **losses['path'],
        },
        **{key: section for key, section in losses.items() if key != 'path'},
    }


def _free_name(name: str) -> str:
    """The name, with a number appended if experiments/ already has a folder of this name.

    Repeating the adaptation under a name in use would archive that folder, which may hold its option file or weights.
    """
    names = itertools.chain([name], (f'{name}_{number}' for number in itertools.count(2)))
    return next(free for free in names if not Path('experiments', free).exists())


def adapted_model(
    opt: dict,
    names: Sequence[str],
    auxiliary: str | None = None,
    watch: Callable[[int, nn.Module], None] | None = None,
    train_set: EpisodeDataset | None = None,
) -> DRTLModel:
    """A model adapted to some of the pairs.

    Args:
        opt (dict): Parsed options.
        names (Sequence[str]): Names of the pairs.
        auxiliary (str | None): Folder of GT images for the auxiliary tasks; None: that of the options.
        watch (Callable | None): Called with step and network; see ``DRTLModel.adapt_to_target``.
        train_set (EpisodeDataset | None): The data set of these options, if it is built already.
    """
    opt = copy.deepcopy(opt)
    opt['datasets']['train']['target']['names'] = list(names)
    if auxiliary is not None:
        opt['datasets']['train']['dataroot_gt'] = auxiliary
    model = build_model(opt)
    if train_set is not None:
        model.train_set = train_set
    model.start()
    model.adapt_to_target(watch)
    return model
