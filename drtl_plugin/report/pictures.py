"""Pictures of validated images: crops where the ground truth has most detail, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from drtl_plugin.report.tables import PASSES

_TILE = 192
_CAPTION = 22
# Side of the crops that are kept of validated images: a tile, and some of what surrounds it.
_CROP = 320


class ComparedCrop(NamedTuple):
    """A crop of a validated image, where its ground truth has most detail.

    Attributes:
        name (str): The image's file name without extension.
        result, gt (np.ndarray): Restored image and ground truth in the same place; uint8 BGR ``(H, W, 3)``, H and W at
            most 320.
    """

    name: str
    result: np.ndarray
    gt: np.ndarray


def compared_crop(name: str, result: np.ndarray, gt: np.ndarray) -> ComparedCrop:
    """Crop a restored image and its ground truth; the place depends on the ground truth only.

    The crops are copies, so that nothing keeps the whole images in memory.

    Args:
        name (str): The image's file name without extension.
        result, gt (np.ndarray): uint8 BGR ``(H, W, 3)``.
    """
    starts = (
        max(min(corner - (_CROP - _TILE) // 2, extent - _CROP), 0)
        for corner, extent in zip(busiest(gt, _TILE), gt.shape[:2], strict=True)
    )
    rows, columns = (slice(start, start + _CROP) for start in starts)
    return ComparedCrop(name, result[rows, columns].copy(), gt[rows, columns].copy())


def comparison_picture(images: Mapping[str, Sequence[ComparedCrop]], dataset: str) -> np.ndarray | None:
    """Crops side by side, where the ground truth has most detail: a row for each image, each pass and the ground truth.

    Args:
        images (Mapping): Crops of some images, by dataset name and pass.
        dataset (str): The validation set.

    Returns:
        ndarray | None: uint8 BGR ``(H, W, 3)``; None where there are no images.
    """
    shown = {suffix: images[dataset + suffix] for suffix in PASSES if images.get(dataset + suffix)}
    rows = []
    for crops in zip(*shown.values(), strict=True):
        gt = crops[0].gt
        top, left = busiest(gt, _TILE)
        tiles = [crop.result for crop in crops] + [gt]
        rows.append(np.hstack([tile[top : top + _TILE, left : left + _TILE] for tile in tiles]))
    if not rows:
        return None
    width = max(row.shape[1] for row in rows)
    rows = [cv2.copyMakeBorder(row, 0, 0, 0, width - row.shape[1], cv2.BORDER_CONSTANT) for row in rows]
    captions = [PASSES[suffix] for suffix in shown] + ['ground truth']
    head = np.full((_CAPTION, width, 3), 255, np.uint8)
    for i, caption in enumerate(captions):
        place = (i * width // len(captions) + 4, _CAPTION - 7)
        cv2.putText(head, caption, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([head, *rows])


def busiest(gt: np.ndarray, side: int) -> tuple[int, int]:
    """Corner, top and left, of the square with the strongest gradients."""
    grey = cv2.cvtColor(gt, cv2.COLOR_BGR2GRAY)
    detail = cv2.boxFilter(np.abs(cv2.Laplacian(grey, cv2.CV_32F)), -1, (side, side), anchor=(0, 0))
    height, width = (max(extent - side + 1, 1) for extent in grey.shape)
    top, left = np.unravel_index(np.argmax(detail[:height, :width]), (height, width))
    return int(top), int(left)
