"""The option file of an adaptation, and the models built from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

from drtl_plugin.api.adapt_pairs import Pair
from drtl_plugin.data.image_files import image_names, image_size
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.models.cross_validation import folds_of, num_runs
from drtl_plugin.runtime.trained_network import TrainedNetwork

# Steps of each adaptation, the learning rates to choose from, and the most folds: nine adaptations for five pairs.
_STEPS, _RATES, _FOLDS = 400, [3e-4, 1e-3, 3e-3], 5
# Side of the LQ patches, where the images are large enough, up to the next size that suits the network.
_LQ_SIZE = 24
# Patch sides must be multiples of this for a U-Net discriminator, which halves them three times.
_HALVED = 8


def adaptation_options(
    network: TrainedNetwork,
    weights: str,
    images: Mapping[str, Pair],
    target: Path,
    auxiliary: str | None,
    budget: int | None,
    losses: Mapping[str, dict],
) -> dict:
    """The option file of an adaptation.

    Args:
        network (TrainedNetwork): The network to adapt.
        weights (str): Its file.
        images (Mapping[str, Pair]): The pairs, by name.
        target (Path): Folder whose ``pairs/gt`` and ``pairs/lq`` hold the pairs.
        auxiliary (str | None): Folder of GT images for the auxiliary tasks; None: those of the pairs.
        budget (int | None): The most steps of all adaptations together; None: no limit.
        losses (Mapping[str, dict]): ``train``, ``path`` and possibly ``network_d``, for the losses.
    """
    scale = network.scale
    folds = folds_of([lq.shape[:2] for _, lq in images.values()], _FOLDS)
    runs = num_runs(len(_RATES), len(folds))
    if budget is not None and budget < runs:
        raise OptionError(f'--budget must be at least {runs}, a step of each adaptation.')
    pairs = target.absolute() / 'pairs'
    auxiliary_gt = pairs / 'gt' if auxiliary is None else Path(auxiliary).absolute()
    sides = [
        side for name in image_names(str(auxiliary_gt), '--auxiliary') for side in image_size(str(auxiliary_gt / name))
    ]
    sides += [scale * side for fold in folds for part in fold for side in (part.height, part.width)]
    multiple = scale * network.window
    if 'network_d' in losses:
        multiple = math.lcm(multiple, _HALVED)
    gt_size = min(multiple * math.ceil(_LQ_SIZE * scale / multiple), *sides) // multiple * multiple
    if gt_size == 0:
        raise DataError(
            f'--pairs: the network needs at least {multiple // scale} LQ pixels a side, but an image, or a part of one '
            f'that is held out, has {min(sides) // scale}; use larger images, or three pairs or more.'
        )
    # Colours and textures of mixtures are not those that a discriminator or VGG should learn or judge.
    augments = not {'gan_opt', 'perceptual_opt'} & set(losses['train'])
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
            'camera_fit': False,
            'weighting': {'relation': 'transfer', 'effective_tasks': 6, 'floor': 0.2},
            'adapt': {
                'folds': _FOLDS,
                'steps': _STEPS if budget is None else min(_STEPS, budget // runs),
                'lr': _RATES,
                'schedule': 'linear',
                'warmup': 20,
                'batch_size': 16,
                'replay': 0,
                'ema_decay': 0,
                **({'mixup': 0.7, 'rgb_permutation': 0.5} if augments else {}),
            },
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
