"""How ``net_g`` is computed while training: bfloat16, memory layout, compiling."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import nn

from drtl_plugin.errors import OptionError
from drtl_plugin.options.sections import DRTLOptions
from drtl_plugin.runtime.device import compile_network, computes_bfloat16, lay_out, training_format


@dataclass(frozen=True)
class Acceleration:
    """How networks are computed.

    Attributes:
        device (torch.device): The device.
        amp (bool): Whether autocast computes in bfloat16; weights stay in single precision.
        compiled (bool): Whether ``net_g`` is compiled.
        memory_format (torch.memory_format): The layout of weights and images.
    """

    device: torch.device
    amp: bool = False
    compiled: bool = False
    memory_format: torch.memory_format = torch.contiguous_format

    def precision(self) -> torch.autocast:
        """The context of a forward pass and its loss.

        Backward passes run outside it: autograd computes each gradient in the type of its forward operation.
        """
        # Weights change between the inner loop's forward passes, so no copies of them may be cached.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp, cache_enabled=False)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """A context in which ``net_g`` runs uncompiled, so that it is not recompiled for each image size."""
        return torch.compiler.set_stance('force_eager') if self.compiled else nullcontext()


def accelerate(net_g: nn.Module, train: dict[str, Any], drtl: DRTLOptions, device: torch.device) -> Acceleration:
    """Prepare ``net_g`` for training by ``train.amp`` and ``train.compile``; warn if the device lacks something.

    Args:
        net_g (nn.Module): Changed in place: laid out, and compiled if ``train.compile`` asks for it.
        train (dict): ``train`` of the option file.
        drtl (DRTLOptions): Its ``drtl`` section.
        device (torch.device): Where ``net_g`` is.

    Raises:
        OptionError: If it cannot be compiled on this machine, or for this algorithm.
    """
    amp = train.get('amp') == 'bf16'
    if amp and not computes_bfloat16(device):
        get_root_logger().warning(
            'train.amp: this device cannot compute in bfloat16 natively, and emulation is much slower; it computes in '
            'single precision instead.'
        )
        amp = False
    # Pre-training in full precision with uniform weights is, bit for bit, what SRModel does.
    is_srmodel = drtl.pipeline == 'pretrain' and drtl.weighting.relation == 'uniform' and not amp
    memory_format = lay_out(net_g, torch.contiguous_format if is_srmodel else training_format(device))
    # Without steps there is nothing to compile: adaptation runs on copies, which are not compiled.
    compiled = bool(train.get('compile', False)) and int(train['total_iter']) > 0
    if compiled:
        if drtl.pipeline == 'meta' and drtl.inner.algorithm == 'maml':
            raise OptionError(
                'train.compile: compiled networks cannot be differentiated twice, which maml requires; remove it, or '
                'choose another drtl.inner.algorithm.'
            )
        compile_network(net_g, device)
    return Acceleration(device, amp, compiled, memory_format)
