"""Networks that spandrel recognises by their weights; their architectures need not be in BasicSR.

https://github.com/chaiNNer-org/spandrel, and spandrel_extra_arches where it is installed.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drtl_plugin.errors import DataError, describe

# The type of such networks in option files.
SPANDREL_NETWORK = 'SpandrelNetwork'
# Smallest side of the image that a network is tried on.
_SIDE = 24


@dataclass(frozen=True, eq=False)
class Recognised:
    """A recognised network.

    Attributes:
        net (nn.Module): The network itself, with its weights, in evaluation mode: RGB in [0, 1] to RGB, not clipped.
        architecture (str): Spandrel's name of the architecture, e.g. ``'SwinIR'``.
        scale (int): 1 for denoising and other restoration.
        window (int): Height and width of the input must be multiples of this.
    """

    net: nn.Module
    architecture: str
    scale: int
    window: int


def spandrel_options(checkpoint: str, window: int) -> dict[str, Any]:
    """``network_g`` of a recognised network."""
    return {'type': SPANDREL_NETWORK, 'checkpoint': str(Path(checkpoint).absolute()), 'window_size': window}


def recognise(content: Any, where: str) -> Recognised | None:
    """Recognise the network of a checkpoint.

    Args:
        content (Any): Content of the file.
        where (str): Beginning of messages, e.g. ``--weights: w.pth``.

    Returns:
        Recognised | None: None if spandrel does not know the weights.

    Raises:
        DataError: If the network does not map one RGB image to one, as plain training requires.
    """
    # Imported here, since it takes half a second.
    from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError

    with contextlib.suppress(ImportError):
        import spandrel_extra_arches

        spandrel_extra_arches.install(ignore_duplicates=True)
    if not isinstance(content, dict):
        return None
    try:
        found = ModelLoader(device='cpu').load_from_state_dict(dict(content))
    except UnsupportedModelError:
        return None
    except Exception as error:  # it takes the weights apart, and anything may be missing
        raise DataError(f'{where}: spandrel cannot build the network of these weights: {describe(error)}') from error
    name = found.architecture.id
    if not isinstance(found, ImageModelDescriptor) or found.purpose == 'FaceSR':
        raise DataError(f'{where}: {name} is not a network for restoring whole images.')
    if (found.input_channels, found.output_channels) != (3, 3):
        raise DataError(
            f'{where}: {name} maps {found.input_channels} channels to {found.output_channels}; 3 to 3 are needed.'
        )
    sizes = found.size_requirements
    if sizes.square:
        raise DataError(f'{where}: {name} restores square images only.')
    window = max(sizes.multiple_of, sizes.minimum)
    net = found.model.eval().requires_grad_(True)
    lq = torch.linspace(0.2, 0.8, 3 * (window * math.ceil(_SIDE / window)) ** 2)
    lq = lq.view(1, 3, window * math.ceil(_SIDE / window), -1)
    try:
        with torch.no_grad():
            plain = net(lq)
        is_plain = isinstance(plain, torch.Tensor) and torch.allclose(plain.clamp(0, 1), found(lq), atol=1e-5)
    except Exception as error:
        raise DataError(f'{where}: {name} cannot restore an RGB image by itself: {describe(error)}') from error
    if not is_plain:
        raise DataError(f'{where}: {name} returns more than an image, or one of another range; it cannot be trained.')
    return Recognised(net, name, found.scale, window)
