"""What a device can do to make networks faster: bfloat16, memory layouts, compiling."""

from __future__ import annotations

import torch
from torch import nn

from drtl_plugin.errors import OptionError

# Of torch.cpu.get_capabilities: instructions that multiply numbers in bfloat16 (x86 and ARM).
_BFLOAT16 = ('avx512_bf16', 'amx_bf16', 'bf16')
# Side of the image that a layout is tried on; as large as the windows of common networks.
_SIZE = 32


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself; others imitate it, and a CPU takes ten times as long then."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, 'get_capabilities'):
        return any(torch.cpu.get_capabilities().get(name, False) for name in _BFLOAT16)
    # Older versions of torch know of x86 only.
    probe = getattr(torch.cpu, '_is_avx512_bf16_supported', None)
    return probe is not None and probe()


def training_format(device: torch.device) -> torch.memory_format:
    """The memory layout that networks are trained in on a device.

    Channels-last is faster where cuDNN and oneDNN have kernels for it. With AVX2, oneDNN has none for the gradients of
    weights: training takes from 0.8 to 1.15 of the time that it takes in torch's own layout then, depending on network
    and patches. Restoring takes less in channels-last on every processor.
    """
    if device.type == 'cuda' or torch.backends.cpu.get_cpu_capability() == 'AVX512':
        return torch.channels_last
    return torch.contiguous_format


def lay_out(net: nn.Module, memory_format: torch.memory_format) -> torch.memory_format:
    """Give a network's weights a memory layout, which its images follow, if it can be computed in it.

    Args:
        net (nn.Module): Changed in place. It cannot where it views images as torch's own layout has them, or has
            weights of five dimensions; it is left in torch's own then.
        memory_format (torch.memory_format): ``torch.channels_last`` or ``torch.contiguous_format``.

    Returns:
        torch.memory_format: The layout that it has.
    """
    if memory_format != torch.contiguous_format:
        training = net.training
        try:
            net.eval().to(memory_format=memory_format)
            device = next(net.parameters(), torch.empty(0)).device
            with torch.no_grad():
                net(torch.zeros(1, 3, _SIZE, _SIZE, device=device))
            return memory_format
        except Exception:  # of whatever kind a network makes of an image that it cannot take so
            pass
        finally:
            net.train(training)
    net.to(memory_format=torch.contiguous_format)
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
