"""Pairs of photographs as people have them: finding them, and how well they lie upon each other."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from drtl_plugin.data.image_files import IMAGE_SUFFIXES, how_to_convert, is_unread
from drtl_plugin.errors import DataError

# What folders, and names after the last separator, are called: ground truth and low quality.
_FOLDERS = (r'gt|hr|hq|h|good', r'lq|lr|l|poor')
_LQ_FOLDER_OF_SCALE = r'(?:lq|lr)_?x{}'
_SUFFIXES = (r'(?:[_-]?(?:gt|hr|hq)|[_-]?h)', r'(?:[_-]?(?:lq|lr)\d?|[_-]?l)')
# Longest side of the images that the alignment is estimated on.
_SIDE = 1200
_SMOOTH = 5
# What an affine map leaves of the difference, at the most; else it fits noise, or skies, and the pair lies well.
_EXPLAINED = 0.5
# Share of a side that is left out at each end there, beyond the shift.
_MARGIN = 0.05
# Below this correlation, two photographs don't show the same.
_HOPELESS = 0.6


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where the low-quality image lies in the reduced ground truth.

    Attributes:
        matrix (np.ndarray): ``(2, 3)``: takes a low-quality pixel ``(x, y, 1)`` to the place in the ground truth,
            reduced by the scale, that shows the same.
        correlation (float): Of the two there, from -1 to 1.
        displacement (float): The largest, in low-quality pixels, that the image has in its corners.
    """

    matrix: np.ndarray
    correlation: float
    displacement: float

    @property
    def shift(self) -> tuple[float, float]:
        """Of the middle of the image to the right and down, in low-quality pixels; see :func:`estimate_alignment`."""
        return float(self.matrix[0, 2]), float(self.matrix[1, 2])

    @property
    def scale(self) -> float:
        """By how much the ground truth is enlarged beyond the nominal scale."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix[:, :2]))))

    @property
    def is_hopeless(self) -> bool:
        """Whether the two don't show the same."""
        return not self.correlation >= _HOPELESS


def find_pairs(folder: str | Path, scale: int | None = None) -> dict[str, tuple[Path, Path]]:
    """Find pairs in a folder: in two folders in it (``gt`` and ``lq``, ``HR`` and ``LR``, ``H`` and ``L``), or by the
    ends of names (``_HR`` and ``_LR``, also ``_LR4``, ``_gt`` and ``_lq``, ``H`` and ``L``).

    Args:
        folder (str | Path): The folder.
        scale (int | None): The scale of the pairs. A folder ``lr_x4`` or ``lrx4``, for scale 4, then comes before
            ``lr``; those of other scales are left alone.

    Returns:
        dict[str, tuple[Path, Path]]: Ground truth and low quality by the name that they share, sorted.

    Raises:
        DataError: If there are none, an image has no partner, or one is of a format that is not read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f'--pairs: there is no folder {folder}.')
    folders = [_folders(root, pattern) for pattern in _FOLDERS]
    if scale is not None:
        folders[1] = _folders(root, _LQ_FOLDER_OF_SCALE.format(scale)) or folders[1]
    if all(len(found) == 1 for found in folders):
        sides = [_by_name(found[0], '') for found in folders]
        # Names that both have are whole, whatever they end in.
        alone = [{name for name in side if name not in other} for side, other in (sides, sides[::-1])]
        sides = [_by_name(found[0], suffix, only) for found, suffix, only in zip(folders, _SUFFIXES, alone)]
    else:
        sides = [_by_name(root, suffix) for suffix in _SUFFIXES]
    if unread := how_to_convert(path for side in sides for path in side.values()):
        raise DataError(f'--pairs: {folder}: {unread}')
    if not sides[0] and not sides[1]:
        raise DataError(
            f'--pairs: {folder} holds no pairs; put them into two folders in it, with the same names in both: gt and '
            f'lq, HR and LR, or HR and LR_x{scale or 4}; or into one folder, with names that end in _HR and _LR.'
        )
    for name in sorted(sides[0].keys() ^ sides[1].keys()):
        raise DataError(f'--pairs: {(sides[0].get(name) or sides[1].get(name))} has no partner.')
    return {name: (sides[0][name], sides[1][name]) for name in sorted(sides[0])}


def _folders(root: Path, pattern: str) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir() and re.fullmatch(pattern, path.name, re.IGNORECASE)]


def _by_name(folder: Path, suffix: str, only: Collection[str] | None = None) -> dict[str, Path]:
    """Images by their names without a suffix: those that have it, or all, and it is taken from ``only`` these names."""
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
    """Estimate an affine map between the images of a pair by the enhanced correlation coefficient (OpenCV's ECC;
    Evangelidis and Psarakis, TPAMI 2008), from where phase correlation finds their shift.

    Args:
        lq (np.ndarray): ``(h, w, 3)``, BGR, uint8.
        gt (np.ndarray): ``(H, W, 3)``, about ``scale`` times as large.
        scale (int): The nominal scale.

    Returns:
        Alignment: Its matrix is about the middle of the low-quality image: a shift is that of the middle. The identity
            where nothing explains notably more.
    """
    height, width = lq.shape[:2]
    gt = gt[: gt.shape[0] // scale * scale, : gt.shape[1] // scale * scale]
    factor = min(1, _SIDE / max(height, width))
    poor, good = (_grey(image, factor / reduction) for image, reduction in ((lq, 1), (gt, scale)))
    common = tuple(min(extents) for extents in zip(poor.shape, good.shape))
    # Copies: OpenCV writes the windowed images over what it is given.
    parts = [image[: common[0], : common[1]] for image in (poor, good)]
    window = cv2.createHanningWindow(common[::-1], cv2.CV_32F)
    (dx, dy), _ = cv2.phaseCorrelate(*(part.copy() for part in parts), window)
    # Where one of the two is blurred or repeats itself, phase correlation errs; the pair may lie well as it is.
    best, matrix = max(
        (_affine(poor, good, start) for start in ((dx, dy), (0.0, 0.0))), key=lambda estimate: estimate[0]
    )
    as_it_is = _correlation(*parts)
    if not 1 - best < _EXPLAINED * (1 - as_it_is):
        best, matrix = as_it_is, np.eye(2, 3)
    # From pixels of what was compared to low-quality pixels, in both images. A pixel's middle lies half a pixel from
    # its corner, and sizes don't reduce evenly.
    to_poor = np.array(poor.shape[::-1]) / (width, height)
    to_good = np.array(good.shape[::-1]) * scale / gt.shape[1::-1]
    linear = matrix[:, :2] * to_poor / to_good[:, None]
    offset = (matrix[:, 2] + 0.5 - matrix[:, :2].sum(axis=1) / 2) / to_good + linear.sum(axis=1) / 2 - 0.5
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = offset + linear @ middle - middle
    corners = np.array([(x, y) for x in (-middle[0], middle[0]) for y in (-middle[1], middle[1])])
    displacement = np.linalg.norm(corners @ (linear - np.eye(2)).T + shift, axis=1).max()
    return Alignment(np.column_stack([linear, shift]), float(best), float(displacement))


def _affine(poor: np.ndarray, good: np.ndarray, start: tuple[float, float]) -> tuple[float, np.ndarray]:
    """Correlation and map from a first guess of the shift; -1 and this guess where nothing is found."""
    # Of the middle of the image, which lies in the other one, too: borders of a warp draw the estimate to their own.
    margins = [min(round(abs(shift) + _MARGIN * extent), extent // 3) for shift, extent in zip(start, poor.shape[::-1])]
    inner = poor[margins[1] : poor.shape[0] - margins[1], margins[0] : poor.shape[1] - margins[0]]
    guess = np.float32([[1, 0, start[0] + margins[0]], [0, 1, start[1] + margins[1]]])
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 200, 1e-7)
    try:
        correlation, matrix = cv2.findTransformECC(inner, good, guess, cv2.MOTION_AFFINE, criteria, None, _SMOOTH)
    except cv2.error:  # it does not converge
        return -1.0, np.array([[1, 0, start[0]], [0, 1, start[1]]])
    matrix = matrix.astype(np.float64)
    matrix[:, 2] -= matrix[:, :2] @ margins
    return correlation, matrix


def _grey(image: np.ndarray, factor: float) -> np.ndarray:
    """A reduced grey image, of single precision."""
    size = tuple(max(1, round(extent * factor)) for extent in image.shape[1::-1])
    return cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY).astype(np.float32)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Of two images, smoothed as ECC does."""
    smooth = [cv2.GaussianBlur(image, (_SMOOTH, _SMOOTH), 0).ravel() for image in (first, second)]
    return float(np.nan_to_num(np.corrcoef(*smooth)[0, 1], nan=-1))


def register(lq: np.ndarray, gt: np.ndarray, scale: int, alignment: Alignment) -> tuple[np.ndarray, np.ndarray]:
    """Lay the ground truth upon the low-quality image, and crop both to what they share.

    Returns:
        tuple[np.ndarray, np.ndarray]: ``lq`` ``(h', w', 3)`` and ``gt`` ``(scale · h', scale · w', 3)``.

    Raises:
        DataError: If hardly anything is shared.
    """
    height, width = lq.shape[:2]
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    linear = alignment.matrix[:, :2]
    offset = alignment.matrix[:, 2] + middle - linear @ middle
    centre = (scale - 1) / 2  # of a low-quality pixel, on the finer grid
    fine = np.column_stack([linear, scale * offset + centre - linear @ np.full(2, centre)])
    size = (width * scale, height * scale)
    warp = cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(gt, fine, size, flags=cv2.INTER_CUBIC | warp, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(np.full(gt.shape[:2], 255, np.uint8), fine, size, flags=cv2.INTER_LINEAR | warp)
    whole = cv2.erode(inside, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_REPLICATE) == 255
    # Low-quality pixels all of whose ground truth is there.
    whole = whole.reshape(height, scale, width, scale).all(axis=(1, 3))
    top, bottom, left, right = 0, height, 0, width
    while top < bottom and left < right:
        part = whole[top:bottom, left:right]
        if part.all():
            break
        # Take away the side that lacks most of its pixels.
        lacking = [(~edge).mean() for edge in (part[0], part[-1], part[:, 0], part[:, -1])]
        worst = int(np.argmax(lacking))
        top, bottom, left, right = (
            top + (worst == 0),
            bottom - (worst == 1),
            left + (worst == 2),
            right - (worst == 3),
        )
    if (bottom - top) * (right - left) < height * width / 4:
        raise DataError('less than a quarter of the photographs shows the same.')
    return lq[top:bottom, left:right], moved[top * scale : bottom * scale, left * scale : right * scale]
