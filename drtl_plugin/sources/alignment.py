"""Pairs of photographs: finding them in a folder, measuring their alignment, and aligning them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from drtl_plugin.data.image_files import IMAGE_SUFFIXES, how_to_convert, is_unread
from drtl_plugin.errors import DataError

# Names of folders, and suffixes of file names, for GT and LQ.
_FOLDERS = (r'gt|hr|hq|h|good', r'lq|lr|l|poor')
_LQ_FOLDER_OF_SCALE = r'(?:lq|lr)_?x{}'
_SUFFIXES = (r'(?:[_-]?(?:gt|hr|hq)|[_-]?h)', r'(?:[_-]?(?:lq|lr)\d?|[_-]?l)')
# Longest side, in pixels, of the images on which alignment is estimated.
_SIDE = 1200
_SMOOTH = 5
# An affine map must at least halve 1 - correlation; otherwise it fits noise or sky, and the pair counts as aligned.
_EXPLAINED = 0.5
# Share of a side ignored at each border, beyond the shift.
_MARGIN = 0.05
# Below this correlation, two photographs do not show the same scene.
_HOPELESS = 0.6


@dataclass(frozen=True, eq=False)
class Alignment:
    """Position of an LQ image in its GT, reduced by the scale.

    Attributes:
        matrix (np.ndarray): ``(2, 3)``: maps ``(x, y, 1)`` in LQ to the matching position in the reduced GT, both
            relative to the centre of LQ.
        correlation (float): Correlation of the two after this map, from -1 to 1.
        displacement (float): Largest displacement of a corner, in LQ pixels.
    """

    matrix: np.ndarray
    correlation: float
    displacement: float

    @property
    def shift(self) -> tuple[float, float]:
        """Shift of the image centre, right and down, in LQ pixels."""
        return float(self.matrix[0, 2]), float(self.matrix[1, 2])

    @property
    def scale(self) -> float:
        """Magnification of GT relative to the nominal scale."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix[:, :2]))))

    @property
    def is_hopeless(self) -> bool:
        """Whether the two images do not show the same scene."""
        return not self.correlation >= _HOPELESS


def find_pairs(folder: str | Path, scale: int | None = None) -> dict[str, tuple[Path, Path]]:
    """Find pairs in a folder.

    Either in two subfolders (``gt`` and ``lq``, ``HR`` and ``LR``, ``H`` and ``L``), or by suffixes of file names
    (``_HR`` and ``_LR`` or ``_LR4``, ``_gt`` and ``_lq``, ``H`` and ``L``).

    Args:
        folder (str | Path): The folder.
        scale (int | None): Scale of the pairs. For scale 4, a folder ``lr_x4`` or ``lrx4`` is preferred to ``lr``;
            folders of other scales are ignored.

    Returns:
        dict[str, tuple[Path, Path]]: GT and LQ by their common name, sorted.

    Raises:
        DataError: If there are no pairs, or an image has no partner or an unsupported format.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f'--pairs: there is no folder {folder}.')
    folders = [_folders(root, pattern) for pattern in _FOLDERS]
    if scale is not None:
        folders[1] = _folders(root, _LQ_FOLDER_OF_SCALE.format(scale)) or folders[1]
    if all(len(found) == 1 for found in folders):
        sides = [_by_name(found[0], '') for found in folders]
        # Names found in both folders are complete; only others may have a suffix.
        alone = [{name for name in side if name not in other} for side, other in (sides, sides[::-1])]
        sides = [
            _by_name(found[0], suffix, only) for found, suffix, only in zip(folders, _SUFFIXES, alone, strict=True)
        ]
    else:
        sides = [_by_name(root, suffix) for suffix in _SUFFIXES]
    if unread := how_to_convert(path for side in sides for path in side.values()):
        raise DataError(f'--pairs: {folder}: {unread}')
    if not sides[0] and not sides[1]:
        raise DataError(
            f'--pairs: {folder} contains no pairs. Use two subfolders with equal file names (gt and lq, HR and LR, or '
            f'HR and LR_x{scale or 4}), or one folder with file names that end in _HR and _LR.'
        )
    for name in sorted(sides[0].keys() ^ sides[1].keys()):
        raise DataError(f'--pairs: {(sides[0].get(name) or sides[1].get(name))} has no partner.')
    return {name: (sides[0][name], sides[1][name]) for name in sorted(sides[0])}


def _folders(root: Path, pattern: str) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir() and re.fullmatch(pattern, path.name, re.IGNORECASE)]


def _by_name(folder: Path, suffix: str, only: Collection[str] | None = None) -> dict[str, Path]:
    """Images with a suffix, by name without it; with ``only``: all images, and only these lose their suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(f'(.+?){suffix}', path.stem, re.IGNORECASE)
        unread = is_unread(path)
        if not (unread or path.suffix.lower() in IMAGE_SUFFIXES) or (only is None and match is None):
            continue
        name = match[1] if match is not None and (only is None or path.stem in only) else path.stem
        if name in found and (unread or is_unread(found[name])):  # a raw file beside its JPEG
            found[name] = found[name] if unread else path
            continue
        if name in found:
            raise DataError(f'--pairs: {found[name]} and {path} have the same name.')
        found[name] = path
    return found


def estimate_alignment(lq: np.ndarray, gt: np.ndarray, scale: int) -> Alignment:
    """Estimate the affine map between the images of a pair.

    Maximises the enhanced correlation coefficient (OpenCV's ECC; Evangelidis and Psarakis, TPAMI 2008), starting from
    the shift found by phase correlation, and from no shift.

    Args:
        lq (np.ndarray): ``(h, w, 3)``, BGR, uint8.
        gt (np.ndarray): ``(H, W, 3)``, BGR, uint8, about ``scale`` times as large.
        scale (int): The nominal scale.

    Returns:
        Alignment: The identity unless another map explains clearly more.
    """
    height, width = lq.shape[:2]
    gt = gt[: gt.shape[0] // scale * scale, : gt.shape[1] // scale * scale]
    factor = min(1, _SIDE / max(height, width))
    lq_grey, gt_grey = (_grey(image, factor / reduction) for image, reduction in ((lq, 1), (gt, scale)))
    common = tuple(min(extents) for extents in zip(lq_grey.shape, gt_grey.shape, strict=True))
    # Copies, since OpenCV overwrites its arguments with the windowed images.
    parts = [image[: common[0], : common[1]] for image in (lq_grey, gt_grey)]
    window = cv2.createHanningWindow(common[::-1], cv2.CV_32F)
    (dx, dy), _ = cv2.phaseCorrelate(parts[0].copy(), parts[1].copy(), window)
    # Phase correlation fails on blurred or repetitive images; the pair may be aligned already.
    best, matrix = max(
        (_affine(lq_grey, gt_grey, start) for start in ((dx, dy), (0.0, 0.0))), key=lambda estimate: estimate[0]
    )
    unaligned = _correlation(*parts)
    if not 1 - best < _EXPLAINED * (1 - unaligned):
        best, matrix = unaligned, np.eye(2, 3)
    # From pixels of the compared images to LQ pixels. Pixel centres are half a pixel from corners, and sizes may not
    # reduce evenly.
    lq_factor = np.array(lq_grey.shape[::-1]) / (width, height)
    gt_factor = np.array(gt_grey.shape[::-1]) * scale / gt.shape[1::-1]
    linear = matrix[:, :2] * lq_factor / gt_factor[:, None]
    offset = (matrix[:, 2] + 0.5 - matrix[:, :2].sum(axis=1) / 2) / gt_factor + linear.sum(axis=1) / 2 - 0.5
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = offset + linear @ middle - middle
    corners = np.array([(x, y) for x in (-middle[0], middle[0]) for y in (-middle[1], middle[1])])
    displacement = np.linalg.norm(corners @ (linear - np.eye(2)).T + shift, axis=1).max()
    return Alignment(np.column_stack([linear, shift]), float(best), float(displacement))


def _affine(lq_grey: np.ndarray, gt_grey: np.ndarray, start: tuple[float, float]) -> tuple[float, np.ndarray]:
    """Correlation and map, starting from a shift; -1 and that shift if ECC does not converge."""
    # Use the centre only, which is inside the other image, too: borders of a warp bias the estimate.
    margins = [
        min(round(abs(shift) + _MARGIN * extent), extent // 3)
        for shift, extent in zip(start, lq_grey.shape[::-1], strict=True)
    ]
    inner = lq_grey[margins[1] : lq_grey.shape[0] - margins[1], margins[0] : lq_grey.shape[1] - margins[0]]
    guess = np.array([[1, 0, start[0] + margins[0]], [0, 1, start[1] + margins[1]]], np.float32)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 200, 1e-7)
    try:
        correlation, found = cv2.findTransformECC(  # type: ignore[call-overload]  # the stub forbids inputMask=None
            inner, gt_grey, guess, cv2.MOTION_AFFINE, criteria, None, _SMOOTH
        )
    except cv2.error:  # no convergence
        return -1.0, np.array([[1, 0, start[0]], [0, 1, start[1]]])
    matrix = np.asarray(found, np.float64)
    matrix[:, 2] -= matrix[:, :2] @ margins
    return correlation, matrix


def _grey(image: np.ndarray, factor: float) -> np.ndarray:
    """A reduced grey image, float32."""
    size = tuple(max(1, round(extent * factor)) for extent in image.shape[1::-1])
    return cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY).astype(np.float32)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of two images, smoothed as in ECC."""
    smooth: np.ndarray = np.stack([cv2.GaussianBlur(image, (_SMOOTH, _SMOOTH), 0).ravel() for image in (first, second)])
    return float(np.nan_to_num(np.corrcoef(smooth)[0, 1], nan=-1))


def register(lq: np.ndarray, gt: np.ndarray, scale: int, alignment: Alignment) -> tuple[np.ndarray, np.ndarray]:
    """Warp GT onto the grid of LQ, and crop both to their common area.

    Returns:
        tuple[np.ndarray, np.ndarray]: ``lq`` ``(h', w', 3)`` and ``gt`` ``(scale · h', scale · w', 3)``.

    Raises:
        DataError: If the common area is less than a quarter of LQ.
    """
    height, width = lq.shape[:2]
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    linear = alignment.matrix[:, :2]
    offset = alignment.matrix[:, 2] + middle - linear @ middle
    centre = (scale - 1) / 2  # of an LQ pixel, on the GT grid
    fine = np.column_stack([linear, scale * offset + centre - linear @ np.full(2, centre)])
    size = (width * scale, height * scale)
    warp = cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(gt, fine, size, flags=cv2.INTER_CUBIC | warp, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(np.full(gt.shape[:2], 255, np.uint8), fine, size, flags=cv2.INTER_LINEAR | warp)
    whole = cv2.erode(inside, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_REPLICATE) == 255
    # LQ pixels with complete GT.
    whole = whole.reshape(height, scale, width, scale).all(axis=(1, 3))
    top, bottom, left, right = 0, height, 0, width
    while top < bottom and left < right:
        part = whole[top:bottom, left:right]
        if part.all():
            break
        # Remove the side with the most missing pixels.
        lacking = [(~edge).mean() for edge in (part[0], part[-1], part[:, 0], part[:, -1])]
        worst = int(np.argmax(lacking))
        top, bottom, left, right = (
            top + (worst == 0),
            bottom - (worst == 1),
            left + (worst == 2),
            right - (worst == 3),
        )
    if (bottom - top) * (right - left) < height * width / 4:
        raise DataError('the photographs have less than a quarter of their area in common.')
    return lq[top:bottom, left:right], moved[top * scale : bottom * scale, left * scale : right * scale]
