"""The device of this process, and what speeds networks up on it: bfloat16, memory layouts, compiling."""

from __future__ import annotations

import os
import re

import torch
from torch import nn

from drtl_plugin.errors import OptionError

# Keys of torch.cpu.get_capabilities for bfloat16 multiplication (x86 and ARM).
_BFLOAT16 = ('avx512_bf16', 'amx_bf16', 'bf16')
# Chosen by --device; None: the first GPU that CUDA reports, or the CPU.
_chosen: torch.device | None = None
# Side of the image on which a layout is tried; a multiple of the window size of common networks.
_SIZE = 32


def choose(name: str) -> None:
    """Choose the device of this process, before anything else asks for one.

    Args:
        name (str): ``auto``, ``cpu``, ``cuda`` (the first GPU), ``cuda:1``, … or ``mps`` (an Apple GPU). With ``cpu``,
            GPUs are hidden from everything in this process.

    Raises:
        OptionError: If there is no such device; says which there are.
    """
    global _chosen
    _chosen = None
    if name == 'auto':
        return
    if not re.fullmatch(r'cpu|mps|cuda(:\d+)?', name):
        raise OptionError(f'--device {name}: expected auto, cpu, cuda, cuda:N or mps.')
    if name == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    else:
        present = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
        present += ['mps'] * torch.backends.mps.is_available()
        if (f'{name}:0' if name == 'cuda' else name) not in present:
            raise OptionError(f'--device {name}: there is no such device; this machine has {", ".join(present)}.')
    _chosen = torch.device(name)
    if _chosen.type == 'cuda' and _chosen.index is not None:
        torch.cuda.set_device(_chosen)


def chosen() -> torch.device | None:
    """The device that :func:`choose` was told; None for ``auto``."""
    return _chosen


def current() -> torch.device:
    """The device of this process: the chosen one, else a GPU if CUDA reports one, else the CPU.

    ``auto`` does not take an Apple GPU: nothing has been tested on one.
    """
    if _chosen is not None:
        return _chosen
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def synthesis_device(device: torch.device) -> torch.device:
    """Where LQ patches are made for a network on ``device``: there, or on the CPU if it lacks double precision.

    Blur kernels are computed in double precision, as in BasicSR, which Apple GPUs lack.
    """
    return device if device.type in ('cpu', 'cuda') else torch.device('cpu')


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device supports bfloat16 in hardware. Emulation takes ten times as long on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == 'mps':
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if hasattr(torch.cpu, 'get_capabilities'):
        return any(torch.cpu.get_capabilities().get(name, False) for name in _BFLOAT16)
    # Older versions of torch, for x86 only.
    probe = getattr(torch.cpu, '_is_avx512_bf16_supported', None)
    return probe is not None and probe()


def training_format(device: torch.device) -> torch.memory_format:
    """The memory layout for training on a device.

    Channels-last is faster if cuDNN or oneDNN has kernels for it. For weight gradients with AVX2, oneDNN has none, and
    training takes 0.8 to 1.15 times as long as in the default layout, depending on network and patches. Inference is
    faster in channels-last on every processor.
    """
    if device.type == 'mps':
        return torch.contiguous_format
    if device.type == 'cuda' or torch.backends.cpu.get_cpu_capability() == 'AVX512':
        return torch.channels_last
    return torch.contiguous_format


def lay_out(net: nn.Module, memory_format: torch.memory_format) -> torch.memory_format:
    """Convert a network's weights to a memory layout, which activations follow, if the network supports it.

    Args:
        net (nn.Module): Changed in place. A network that calls ``view`` on images or has five-dimensional weights keeps
            the default layout.
        memory_format (torch.memory_format): ``torch.channels_last`` or ``torch.contiguous_format``.

    Returns:
        torch.memory_format: The layout of the network afterwards.
    """
    if memory_format != torch.contiguous_format:
        training = net.training
        try:
            net.eval().to(memory_format=memory_format)  # type: ignore[call-overload]
            device = next(net.parameters(), torch.empty(0)).device
            with torch.no_grad():
                net(torch.zeros(1, 3, _SIZE, _SIZE, device=device))
            return memory_format
        except Exception:  # any error: the network does not support this layout
            pass
        finally:
            net.train(training)
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return torch.contiguous_format


def compile_network(net: nn.Module, device: torch.device) -> None:
    """Let ``torch.compile`` compile a network on its first call; names of parameters do not change.

    Args:
        net (nn.Module): Changed in place. Copies are not compiled.
        device (torch.device): Device of the network.

    Raises:
        OptionError: If compiling fails here, e.g. without a C++ compiler (CPU) or Triton (GPU).
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # each backend has its own errors
        reason = str(error).strip().split('\n')[0]
        raise OptionError(
            f'train.compile: torch.compile does not work here ({reason}); install what it needs, or remove the option.'
        ) from None
    net.compile()
