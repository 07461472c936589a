"""The discriminator of a GAN, and its step: BasicSR's own, around an output that is there already."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from basicsr.archs import build_network
from basicsr.archs.vgg_arch import VGG_PRETRAIN_PATH
from basicsr.losses import build_loss
from basicsr.models.esrgan_model import ESRGANModel
from basicsr.models.srgan_model import SRGANModel
from torch import Tensor, nn

from drtl_plugin.errors import OptionError
from drtl_plugin.meta.adaptation import Backward
from drtl_plugin.options.parse import DRTLOptions

if TYPE_CHECKING:
    from drtl_plugin.models.drtl_model import DRTLModel


def build_discriminator(network: dict, seed: int) -> nn.Module:
    """Build a discriminator whose initial weights depend on the seed alone; global random state does not change.

    Args:
        network (dict): ``network_d`` of the option file: type and arguments.
        seed (int): Of its initial weights.

    Returns:
        nn.Module: On the CPU, in training mode.
    """
    # BasicSR prints that it finds UNetDiscriminatorSN under another name.
    with torch.random.fork_rng(), contextlib.redirect_stdout(None):
        torch.manual_seed(seed)
        return build_network(network).train()


def check_losses(opt: dict, trains_by_gan: bool) -> None:
    """Check that the losses of an option file go together.

    Args:
        opt (dict): Parsed options of a ``DRTLModel``.
        trains_by_gan (bool): Whether there are steps that a discriminator could take part in.

    Raises:
        OptionError: If a loss is missing, or would be downloaded, or a discriminator has no use.
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
    if not trains_by_gan:
        raise OptionError('network_d: there are no GAN steps in pipeline: meta; use drtl.pipeline: pretrain.')
    if not opt.get('network_d'):
        raise OptionError('network_d is missing: train.gan_opt needs a discriminator, e.g. type: UNetDiscriminatorSN.')
    for key in ('gan_opt', 'optim_d'):
        if not train.get(key):
            raise OptionError(f'train.{key} is missing: network_d needs it.')
    if DRTLOptions.from_opt(opt).target_weight > 0:
        raise OptionError('drtl.target_weight: the term has no GAN loss; set it to 0, or remove network_d.')


class Adversary:
    """A discriminator with its GAN loss, whose gradients are those of BasicSR's SRGANModel or ESRGANModel.

    Args:
        net_d (nn.Module): The discriminator; it computes in single precision.
        cri_gan (nn.Module): ``GANLoss``, or one with its signature.
        relativistic (bool): The steps of ESRGANModel instead of those of SRGANModel, which are Real-ESRGAN's, too.
        net_d_iters (int): The generator gets gradients in every such step.
        net_d_init_iters (int): Not before so many steps of the discriminator alone.
    """

    def __init__(
        self,
        net_d: nn.Module,
        cri_gan: nn.Module,
        relativistic: bool = False,
        net_d_iters: int = 1,
        net_d_init_iters: int = 0,
    ) -> None:
        self.net_d = net_d
        self.cri_gan = cri_gan
        self.net_d_iters = net_d_iters
        self.net_d_init_iters = net_d_init_iters
        self._model = ESRGANModel if relativistic else SRGANModel

    def backward(self, loss: Tensor, output: Tensor, gt: Tensor, step: int = 1) -> OrderedDict:
        """Add up the gradients of the generator and of the discriminator; no optimiser takes a step.

        Args:
            loss (Tensor): The generator's other losses, a scalar.
            output (Tensor): Of the generator, ``(B, 3, H, W)``, with its graph.
            gt (Tensor): The same size.
            step (int): From 1, for ``net_d_iters`` and ``net_d_init_iters``.

        Returns:
            OrderedDict: BasicSR's GAN losses by name, detached: ``l_g_gan``, ``l_d_real``, ``l_d_fake``,
            ``out_d_real``, ``out_d_fake``.
        """
        optimizer = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
        model = SimpleNamespace(
            lq=None,
            gt=gt,
            net_g=lambda lq: output.float(),
            net_d=self.net_d,
            cri_pix=lambda *_: loss,
            cri_perceptual=None,
            cri_gan=self.cri_gan,
            net_d_iters=self.net_d_iters,
            net_d_init_iters=self.net_d_init_iters,
            optimizer_g=optimizer,
            optimizer_d=optimizer,
            ema_decay=0,
            reduce_loss_dict=lambda losses: losses,
        )
        self._model.optimize_parameters(model, step)
        model.log_dict.pop('l_g_pix', None)
        return OrderedDict((name, value.detach()) for name, value in model.log_dict.items())


def build_adversary(model: DRTLModel) -> Adversary:
    """The adversary that the options of a model ask for; ``model.net_d`` becomes its discriminator."""
    path, train = model.opt['path'], model.opt['train']
    model.net_d = model.model_to_device(build_discriminator(model.opt['network_d'], model.opt['manual_seed']))
    model.print_network(model.net_d)
    if path.get('pretrain_network_d') is not None:
        strict = path.get('strict_load_d', True)
        model.load_network(model.net_d, path['pretrain_network_d'], strict, path.get('param_key_d', 'params'))
    return Adversary(
        model.net_d,
        build_loss(train['gan_opt']).to(model.device),
        train.get('relativistic', False),
        train.get('net_d_iters', 1),
        train.get('net_d_init_iters', 0),
    )


def adversarial_backward(model: DRTLModel) -> Backward:
    """The gradients of the steps of an adaptation, and the steps of its discriminator, a copy of the model's."""
    # spectral_norm leaves tensors behind that cannot be copied.
    net_d = build_discriminator(model.opt['network_d'], model.opt['manual_seed']).to(model.device)
    net_d.load_state_dict(model.net_d.state_dict())
    adversary = Adversary(net_d, model.adversary.cri_gan, model.opt['train'].get('relativistic', False))
    optimizer = model.make_optimizer_d(net_d)

    def backward(loss: Tensor, output: Tensor, gt: Tensor) -> None:
        optimizer.zero_grad()
        adversary.backward(loss, output, gt)
        optimizer.step()

    return backward


def try_losses(model: DRTLModel) -> None:
    """Compute the losses of a patch once, to find out whether they can take its size.

    Raises:
        OptionError: If they cannot.
    """
    size = model.task_data.options.gt_size
    for side in sorted({size, *(min(size, *gt.shape[-2:]) for _, gt in model.target_pairs or ())}):
        patch = torch.rand(2, 3, side, side, device=model.device)
        try:
            model.criterion(patch, patch)
            if model.adversary is not None:
                model.net_d(patch)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise OptionError(
                f'datasets.train.gt_size: the losses cannot take patches of {side} pixels a side '
                f'({" ".join(str(error).split())}); change it, or the loss or network_d.'
            ) from None
