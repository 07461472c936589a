"""The losses of an option file: checks before training, and their sum."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import torch
from basicsr.archs.vgg_arch import VGG_PRETRAIN_PATH
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from torch import Tensor, nn

from drtl_plugin.data.interface import EpisodeDataset
from drtl_plugin.errors import OptionError
from drtl_plugin.meta.learner import Criterion

# Losses that only add to others.
_FURTHER = ('msssim', 'frequency')


class Losses:
    """The losses of a training step except the GAN loss: pixel, perceptual, MS-SSIM and frequency loss.

    Args:
        model (SRModel): Its ``cri_pix`` and ``cri_perceptual`` are looked up at each call, since a derived model may
            replace them.
        train (dict): ``train`` of the option file, for the other losses.
        device (torch.device): Where they are computed.
    """

    def __init__(self, model: SRModel, train: dict[str, Any], device: torch.device) -> None:
        self._model = model
        self.further: dict[str, nn.Module] = {
            f'l_{name}': build_loss(train[f'{name}_opt']).to(device) for name in _FURTHER if train.get(f'{name}_opt')
        }

    def __call__(self, output: Tensor, gt: Tensor) -> Tensor:
        """The sum of the losses, a scalar, for ``output`` and ``gt`` of ``(B, 3, H, W)``."""
        return self.by_name(output, gt)[0]

    def by_name(self, output: Tensor, gt: Tensor) -> tuple[Tensor, OrderedDict[str, Tensor]]:
        """The sum of the losses, and each loss under the name that ``SRModel`` logs."""
        losses: OrderedDict[str, Tensor] = OrderedDict()
        output = output.float()
        if self._model.cri_pix:
            losses['l_pix'] = self._model.cri_pix(output, gt)
        if self._model.cri_perceptual:
            l_percep, l_style = self._model.cri_perceptual(output, gt)
            losses.update({k: v for k, v in (('l_percep', l_percep), ('l_style', l_style)) if v is not None})
        losses.update((name, criterion(output, gt)) for name, criterion in self.further.items())
        return cast('Tensor', sum(losses.values())), losses


def check_losses(opt: dict[str, Any], has_gan_steps: bool) -> None:
    """Check that the losses of an option file go together.

    Args:
        opt (dict): Parsed options of a ``DRTLModel``.
        has_gan_steps (bool): Whether a discriminator could take part in any step.

    Raises:
        OptionError: If a loss is missing, would download weights, or a discriminator would not be used.
    """
    train = opt['train']
    perceptual = train.get('perceptual_opt')
    if not train.get('pixel_opt') and not perceptual:
        raise OptionError(
            'train: pixel_opt or perceptual_opt is missing; msssim_opt, frequency_opt and gan_opt only add to them.'
        )
    if perceptual and perceptual.get('type') == 'PerceptualLoss':
        cached = Path(torch.hub.get_dir(), 'checkpoints').glob(f'{perceptual.get("vgg_type", "vgg19")}-*.pth')
        if not Path(VGG_PRETRAIN_PATH).is_file() and not any(cached):
            raise OptionError(
                'train.perceptual_opt: PerceptualLoss would download its VGG weights; use type: VGGPerceptualLoss with '
                'vgg_weights: FILE.'
            )
    if not opt.get('network_d') and not train.get('gan_opt'):
        return
    if not has_gan_steps:
        raise OptionError('network_d: pipeline: meta has no GAN steps; use drtl.pipeline: pretrain.')
    if not opt.get('network_d'):
        raise OptionError('network_d is missing: train.gan_opt needs a discriminator, e.g. type: UNetDiscriminatorSN.')
    for key in ('gan_opt', 'optim_d'):
        if not train.get(key):
            raise OptionError(f'train.{key} is missing: network_d needs it.')


def try_patches(train_set: EpisodeDataset, criterion: Criterion, net_d: nn.Module | None, device: torch.device) -> None:
    """Compute the losses of random patches of the sizes that training uses.

    Args:
        train_set (EpisodeDataset): Determines the sizes.
        criterion (Criterion): The loss.
        net_d (nn.Module | None): The discriminator, if there is one.
        device (torch.device): Where they are.

    Raises:
        OptionError: If a loss or the discriminator cannot handle a size.
    """
    size = train_set.options.gt_size
    for side in sorted({size, *(min(size, *gt.shape[-2:]) for _, gt in train_set.target_pairs or ())}):
        patch = torch.rand(2, 3, side, side, device=device)
        try:
            criterion(patch, patch)
            if net_d is not None:
                net_d(patch)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise OptionError(
                f'datasets.train.gt_size: the losses cannot take patches of {side} pixels a side '
                f'({" ".join(str(error).split())}); change it, or the loss or network_d.'
            ) from None
