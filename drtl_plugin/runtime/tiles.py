"""Restoring images of any size: padded to whole windows, and tile by tile where memory is short."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

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
            reflection, or by their border where they are smaller than that.
        tile (int): Side, in low-quality pixels, of the tiles that are restored one after the other, so that memory
            does not grow with the image; 0 restores the image as a whole.
        overlap (int): Low-quality pixels around a tile that the network sees beside it. From the network's reach on,
            the result is that of the whole image.

    Returns:
        Tensor: ``(B, 3, scale · h, scale · w)``.
    """
    height, width = lq.shape[-2:]
    if not tile or tile >= max(height, width):
        below, right = -height % window, -width % window
        mode = 'reflect' if below < height and right < width else 'replicate'
        return net(F.pad(lq, (0, right, 0, below), mode))[..., : height * scale, : width * scale]
    result = lq.new_empty(*lq.shape[:-2], height * scale, width * scale)
    for part in parts(height, width, tile, overlap):
        restored = restore(net, lq[..., part.seen[0], part.seen[1]], scale, window)
        (rows, columns), (kept_rows, kept_columns) = part.place(scale), part.kept(scale)
        result[..., rows, columns] = restored[..., kept_rows, kept_columns]
    return result


@dataclass(frozen=True)
class Part:
    """A tile: rows and columns of the low-quality image that the network sees, and those that are kept of it."""

    seen: tuple[slice, slice]
    inner: tuple[slice, slice]

    def place(self, scale: int) -> tuple[slice, slice]:
        """Where the tile lies in the restored image."""
        rows, columns = (slice(s.start * scale, s.stop * scale) for s in self.inner)
        return rows, columns

    def kept(self, scale: int) -> tuple[slice, slice]:
        """What is kept of the network's output."""
        rows, columns = (
            slice((s.start - seen.start) * scale, (s.stop - seen.start) * scale)
            for s, seen in zip(self.inner, self.seen)
        )
        return rows, columns


def parts(height: int, width: int, tile: int, overlap: int) -> list[Part]:
    """The tiles of an image of ``(height, width)`` low-quality pixels; see :func:`restore`."""
    result = []
    for inner in itertools.product(_intervals(height, tile), _intervals(width, tile)):
        rows, columns = (
            slice(max(s.start - overlap, 0), min(s.stop + overlap, extent)) for s, extent in zip(inner, (height, width))
        )
        result.append(Part((rows, columns), inner))
    return result


def _intervals(extent: int, largest: int) -> list[slice]:
    """Parts of even size."""
    num = math.ceil(extent / largest)
    edges = [extent * i // num for i in range(num + 1)]
    return [slice(*edge) for edge in zip(edges, edges[1:])]
