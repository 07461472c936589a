"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685, section 4.1) for convolutions and linear layers.

``W' = W + B A`` with ``A (r, fan_in)``, ``B (fan_out, r)``, B = 0 at first; a convolution's weight
``(out, in / groups, k, k)`` counts as a matrix ``(out, in k² / groups)``. Only A and B learn. Merged, the network is
what it was before, with other weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from drtl_plugin.errors import OptionError


class LowRankUpdate(nn.Module):
    """``W ↦ W + B A``, a parametrization.

    Args:
        weight (Tensor): W, ``(out, …)``.
        rank (int): r; no more than the largest rank that W can have is used.
        generator (torch.Generator): Draws A, on the CPU: normal, of variance ``1 / fan_in``.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        matrix = weight.flatten(1)
        rank = min(rank, *matrix.shape)
        down = torch.randn(rank, matrix.shape[1], generator=generator) / matrix.shape[1] ** 0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(matrix.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def _adapted_modules(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def add_low_rank(net: nn.Module, rank: int) -> None:
    """Put adapters on all ``Conv2d`` and ``Linear`` layers of ``net``, and let nothing else learn.

    Args:
        net (nn.Module): Changed in place; its output stays as it is at first.
        rank (int): r, above 0.

    Raises:
        OptionError: If there is no such layer.
    """
    if not _adapted_modules(net):
        raise OptionError('drtl.adapt.rank: network_g has no Conv2d or Linear layers to put adapters on; use rank: 0.')
    net.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module in _adapted_modules(net):
        update = LowRankUpdate(module.get_parameter('weight'), rank, generator)
        parametrize.register_parametrization(module, 'weight', update)


def merge_low_rank(net: nn.Module) -> nn.Module:
    """Merge adapters, if there are any, into the weights, in place: no cost at inference, the same keys as before.

    Returns:
        nn.Module: ``net``.
    """
    for module in _adapted_modules(net):
        if parametrize.is_parametrized(module, 'weight'):
            parametrize.remove_parametrizations(module, 'weight', leave_parametrized=True)
    return net
