"""Restoring images of any size: padded to multiples of the window, and in tiles to save memory."""

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
    """Restore images with a network.

    Args:
        net (Callable): Maps ``(B, 3, h, w)`` to ``(B, 3, scale · h, scale · w)``.
        lq (Tensor): ``(B, 3, h, w)``.
        scale (int): Scale of the network.
        window (int): Height and width of the network's input must be multiples of this; images are padded by
            reflection, or by replication if they are too small for that.
        tile (int): Side of the tiles in LQ pixels, so that memory does not grow with the image; 0 restores the whole
            image at once.
        overlap (int): Context around each tile, in LQ pixels. If it is at least the network's receptive radius, the
            result equals that of the whole image.

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
    """A tile: rows and columns of the LQ image that the network sees, and those whose result is kept."""

    seen: tuple[slice, slice]
    inner: tuple[slice, slice]

    def place(self, scale: int) -> tuple[slice, slice]:
        """Rows and columns of the tile in the restored image."""
        rows, columns = (slice(s.start * scale, s.stop * scale) for s in self.inner)
        return rows, columns

    def kept(self, scale: int) -> tuple[slice, slice]:
        """Rows and columns of the network's output that are kept."""
        rows, columns = (
            slice((s.start - seen.start) * scale, (s.stop - seen.start) * scale)
            for s, seen in zip(self.inner, self.seen, strict=True)
        )
        return rows, columns


def parts(height: int, width: int, tile: int, overlap: int) -> list[Part]:
    """The tiles of an image of ``(height, width)`` LQ pixels; see :func:`restore`."""
    result = []
    for inner in itertools.product(_intervals(height, tile), _intervals(width, tile)):
        rows, columns = (
            slice(max(s.start - overlap, 0), min(s.stop + overlap, extent))
            for s, extent in zip(inner, (height, width), strict=True)
        )
        result.append(Part((rows, columns), inner))
    return result


def _intervals(extent: int, largest: int) -> list[slice]:
    """Split ``extent`` into parts of nearly equal size, at most ``largest``."""
    num = math.ceil(extent / largest)
    edges = [extent * i // num for i in range(num + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]
