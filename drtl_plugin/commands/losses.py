"""``--loss``: losses, their weights, and the files they need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from drtl_plugin.errors import DataError, OptionError, unknown
from drtl_plugin.options.convert import number
from drtl_plugin.runtime import checkpoints

# Kinds of losses, and whether they take a file (VGG19, or a discriminator).
_TAKES_FILE = {'pixel': False, 'msssim': False, 'frequency': False, 'perceptual': True, 'gan': True}
# Real-ESRGAN's discriminator, but smaller: a new one learns from a few pairs only.
_DISCRIMINATOR = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 32}


def loss_sections(losses: Sequence[str]) -> dict[str, dict]:
    """The sections of an option file that declare the losses.

    Args:
        losses (Sequence[str]): Each ``KIND=WEIGHT`` or ``KIND=WEIGHT:FILE``, e.g. ``gan=0.1``.

    Returns:
        dict[str, dict]: ``train``, ``path`` and, for a GAN, ``network_d``.

    Raises:
        OptionError: If a loss is unknown or given twice, lacks its weight or file, or needs another loss in addition.
        DataError: If a file is missing or does not hold the weights.
    """
    train: dict[str, dict] = {}
    sections: dict[str, dict] = {'train': train, 'path': {}}
    for text in losses:
        where = f'--loss {text}'
        kind, _, value = text.partition('=')
        text_of_weight, _, file = value.partition(':')
        if kind not in _TAKES_FILE:
            raise unknown('loss', kind, _TAKES_FILE, where)
        if f'{kind}_opt' in train:
            raise OptionError(f'{where}: {kind} is given twice.')
        weight = number(text_of_weight, float, f'{where}: weight', math.ulp(0))
        if file and not _TAKES_FILE[kind]:
            raise OptionError(f'{where}: {kind} takes no file; write {kind}={weight:g}.')
        if file and not Path(file).is_file():
            raise DataError(f'{where}: there is no file {file}.')
        train[f'{kind}_opt'] = _section(kind, weight, file, where)
        if kind == 'gan':
            train['optim_d'] = {'type': 'Adam', 'lr': 1e-4, 'betas': [0.9, 0.99]}
            sections['network_d'] = dict(_DISCRIMINATOR)
            if file:
                sections['network_d'], key = _discriminator(file, where)
                sections['path'] = {'pretrain_network_d': str(Path(file).absolute()), 'param_key_d': key}
    if not {'pixel_opt', 'perceptual_opt'} & set(train):
        raise OptionError('--loss: pixel or perceptual is missing; the other losses only add to them.')
    return sections


def _section(kind: str, weight: float, file: str, where: str) -> dict:
    if kind == 'perceptual':
        if not file:
            raise OptionError(
                f"{where}: name torchvision's VGG19 weights, which are not downloaded: "
                f'perceptual={weight:g}:vgg19-dcbb9e9d.pth.'
            )
        return {'type': 'VGGPerceptualLoss', 'vgg_weights': str(Path(file).absolute()), 'perceptual_weight': weight}
    if kind == 'gan':
        return {'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': weight}
    return {'type': {'pixel': 'L1Loss', 'msssim': 'MSSSIMLoss', 'frequency': 'FFTLoss'}[kind], 'loss_weight': weight}


def _discriminator(file: str, where: str) -> tuple[dict, str | None]:
    """``network_d`` for a file of weights, as recorded there or a UNetDiscriminatorSN, and the key of the weights."""
    content = checkpoints.read(file, where)
    key, weights = checkpoints.weights_in(content, file, where)
    recorded = content.get('network') if isinstance(content, dict) else None
    if recorded is not None and 'Discriminator' in str(recorded.get('type')):
        return recorded, key
    first = weights.get('conv0.weight')
    if recorded is not None or first is None or 'conv9.weight' not in weights:
        raise DataError(f'{where}: {file} holds no UNetDiscriminatorSN; name other discriminators in an option file.')
    return {**_DISCRIMINATOR, 'num_feat': len(first)}, key
