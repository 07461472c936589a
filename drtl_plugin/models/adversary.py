"""A GAN's discriminator, and BasicSR's own GAN step for an output that has already been computed."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.models.esrgan_model import ESRGANModel
from basicsr.models.srgan_model import SRGANModel
from torch import Tensor, nn

from drtl_plugin.meta.adaptation import Backward


def build_discriminator(network: dict[str, Any], seed: int) -> nn.Module:
    """Build a discriminator; its initial weights depend only on the seed, and the global generators don't change.

    Args:
        network (dict): ``network_d`` of the option file: type and arguments.
        seed (int): Seed of the initial weights.

    Returns:
        nn.Module: On the CPU, in training mode.
    """
    # BasicSR prints a line when it finds UNetDiscriminatorSN under another name.
    with torch.random.fork_rng(), contextlib.redirect_stdout(None):
        torch.manual_seed(seed)
        net_d: nn.Module = build_network(network)
    return net_d.train()


class Adversary:
    """A discriminator with its GAN loss. The gradients are those of BasicSR's SRGANModel or ESRGANModel.

    Args:
        net_d (nn.Module): The discriminator; it computes in single precision.
        cri_gan (nn.Module): ``GANLoss``, or a loss with its signature.
        relativistic (bool): Step as ESRGANModel does, rather than as SRGANModel (and Real-ESRGAN) do.
        net_d_iters (int): The generator gets gradients every ``net_d_iters`` steps.
        net_d_init_iters (int): The discriminator trains alone for this many steps first.
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
        self.relativistic = relativistic

    def backward(self, loss: Tensor, output: Tensor, gt: Tensor, step: int = 1) -> OrderedDict[str, Tensor]:
        """Accumulate the gradients of the generator and of the discriminator; no optimiser takes a step.

        Args:
            loss (Tensor): Sum of the generator's other losses, a scalar.
            output (Tensor): The generator's output ``(B, 3, H, W)``, with its graph.
            gt (Tensor): ``(B, 3, H, W)``.
            step (int): Counted from 1, for ``net_d_iters`` and ``net_d_init_iters``.

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
        basicsr_model = ESRGANModel if self.relativistic else SRGANModel
        basicsr_model.optimize_parameters(model, step)
        model.log_dict.pop('l_g_pix', None)
        return OrderedDict((name, value.detach()) for name, value in model.log_dict.items())


def make_adversary(net_d: nn.Module, train: dict[str, Any], device: torch.device) -> Adversary:
    """The adversary that ``train`` of an option file describes, around a discriminator."""
    return Adversary(
        net_d,
        build_loss(train['gan_opt']).to(device),
        train.get('relativistic', False),
        train.get('net_d_iters', 1),
        train.get('net_d_init_iters', 0),
    )


def adversarial_backward(
    adversary: Adversary, network: dict[str, Any], make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> Backward:
    """The backward pass of adaptation steps, which also trains a copy of the discriminator.

    Args:
        adversary (Adversary): Of the training run; not changed.
        network (dict): ``network_d`` of the option file.
        make_optimizer (Callable): Makes the optimiser of a discriminator.
    """
    # spectral_norm leaves tensors in the module that cannot be copied, so it is rebuilt and its weights are loaded.
    net_d = build_discriminator(network, 0).to(next(adversary.net_d.parameters()).device)
    net_d.load_state_dict(adversary.net_d.state_dict())
    copied = Adversary(net_d, adversary.cri_gan, adversary.relativistic)
    optimizer = make_optimizer(net_d)

    def backward(loss: Tensor, output: Tensor, gt: Tensor) -> None:
        optimizer.zero_grad()
        copied.backward(loss, output, gt)
        optimizer.step()

    return backward
