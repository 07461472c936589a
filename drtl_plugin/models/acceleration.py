"""What a device can do to make training faster: bfloat16, memory layouts, compiled networks."""

from __future__ import annotations

import torch
from torch import nn

from drtl_plugin.errors import OptionError

# Of torch.cpu.get_capabilities: instructions that multiply numbers in bfloat16 (x86 and ARM).
_BFLOAT16 = ('avx512_bf16', 'amx_bf16', 'bf16')


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself; others imitate it, and a CPU takes ten times as long then."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, 'get_capabilities'):  # before torch 2.12 or so
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return any(torch.cpu.get_capabilities().get(name, False) for name in _BFLOAT16)


def training_format(device: torch.device) -> torch.memory_format:
    """The memory layout that networks are trained in.

    Channels-last is faster wherever oneDNN and cuDNN have kernels for it. With AVX2, oneDNN has none for gradients of
    weights: training then takes from 0.8 to 1.15 of the time, depending on network and patches. (Restoring images takes
    less on every processor.)
    """
    if device.type == 'cuda' or torch.backends.cpu.get_cpu_capability() == 'AVX512':
        return torch.channels_last
    return torch.contiguous_format


def compile_network(net: nn.Module, device: torch.device) -> None:
    """Have ``torch.compile`` translate a network when it is first called; its parameters, names and copies stay.

    Args:
        net (nn.Module): Changed in place. Copies of it are not compiled.
        device (torch.device): That it is on.

    Raises:
        OptionError: If nothing can be compiled here, for want of a C++ compiler (CPU) or of Triton (GPU).
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # each backend has kinds of its own
        reason = str(error).strip().split('\n')[0]
        raise OptionError(
            f'train.compile: torch.compile does not work here ({reason}); install what it wants, or leave it out.'
        ) from None
    net.compile()
