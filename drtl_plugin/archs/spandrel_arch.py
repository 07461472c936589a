"""Networks of published checkpoints, built by spandrel."""

from __future__ import annotations

from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from drtl_plugin.errors import OptionError
from drtl_plugin.runtime import checkpoints
from drtl_plugin.runtime.recognition import recognise


@ARCH_REGISTRY.register()
def SpandrelNetwork(checkpoint: str, window_size: int = 1) -> nn.Module:
    """Build the network of a checkpoint that spandrel recognises, with its weights.

    In option files: ``network_g: {type: SpandrelNetwork, checkpoint: FILE}``.

    Args:
        checkpoint (str): ``.pth``, ``.ckpt`` or ``.safetensors``. Default in option files: ``path.pretrain_network_g``.
        window_size (int): Filled in by option files; height and width of the input must be multiples of it.

    Returns:
        nn.Module: The network itself, whose weights have the names that spandrel gives them.

    Raises:
        OptionError: If spandrel does not recognise the checkpoint.
        DataError: If it cannot be read, or its network cannot be trained.
    """
    where = f'network_g.checkpoint: {checkpoint}'
    found = recognise(checkpoints.read(checkpoint, 'network_g.checkpoint'), where)
    if found is None:
        raise OptionError(f'{where} contains no network that spandrel recognises.')
    return found.net
