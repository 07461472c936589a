"""Restoring images of any size: padded to whole windows, and tile by tile where memory is short."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def restore(
    net: Callable[[Tensor], Tensor], lq: Tensor, scale: int, window: int = 1, tile: int = 0, overlap: int = 32
) -> Tensor:
    """Restore images by a network.

    Args:
        net (Callable): Takes ``(B, 3, h, w)`` to ``(B, 3, scale · h, scale · w)``.
        lq (Tensor): ``(B, 3, h, w)``.
        scale (int): By how much the network enlarges.
        window (int): What height and width of the network's input must be multiples of; images are continued by
            reflection.
        tile (int): Side, in low-quality pixels, of the tiles that are restored one after the other, so that memory
            does not grow with the image; 0 restores the image as a whole.
        overlap (int): Low-quality pixels around a tile that the network sees beside it. From the network's reach on,
            the result is that of the whole image.

    Returns:
        Tensor: ``(B, 3, scale · h, scale · w)``.
    """
    height, width = lq.shape[-2:]
    if not tile or tile >= max(height, width):
        padded = F.pad(lq, (0, -width % window, 0, -height % window), 'reflect')
        return net(padded)[..., : height * scale, : width * scale]
    result = lq.new_empty(*lq.shape[:-2], height * scale, width * scale)
    for top, bottom in _parts(height, tile):
        for left, right in _parts(width, tile):
            above, before = max(top - overlap, 0), max(left - overlap, 0)
            seen = lq[..., above : bottom + overlap, before : right + overlap]
            restored = restore(net, seen, scale, window)
            result[..., top * scale : bottom * scale, left * scale : right * scale] = restored[
                ...,
                (top - above) * scale : (bottom - above) * scale,
                (left - before) * scale : (right - before) * scale,
            ]
    return result


def _parts(extent: int, largest: int) -> list[tuple[int, int]]:
    """Beginnings and ends of parts of even size."""
    num = math.ceil(extent / largest)
    edges = [extent * i // num for i in range(num + 1)]
    return list(zip(edges, edges[1:]))
