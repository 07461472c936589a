"""The pairs given to ``basicsr adapt``: scale, alignment, and the images to adapt to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np

from drtl_plugin.data.image_files import read_image
from drtl_plugin.data.photographs import require_same_profile
from drtl_plugin.errors import DataError
from drtl_plugin.runtime.progress import progress
from drtl_plugin.sources.alignment import Alignment, estimate_alignment, register

# The misalignment, in LQ pixels at the worst corner, that is accepted without registration.
_MISALIGNED = 2
# How far the ratio of GT to LQ size may be from a whole number to count as the scale of the pair.
_NEARLY = 0.1
# How far the measured scale of a pair may be from that of the weights, as a share, if its sizes fit another scale.
_ZOOM = 0.1

Pair = tuple[np.ndarray, np.ndarray]


def aligned(
    found: Mapping[str, tuple[Path, Path]], scale: int, registers: bool
) -> Iterator[tuple[str, Alignment, Pair]]:
    """Check each pair.

    Args:
        found (Mapping[str, tuple[Path, Path]]): GT and LQ file of each pair, by name.
        scale (int): Scale of the weights.
        registers (bool): Whether to align each GT image to its LQ image.

    Yields:
        tuple[str, Alignment, Pair]: Name, alignment, and images ``(gt, lq)``, uint8 ``(H, W, 3)``, BGR.

    Raises:
        DataError: If a pair does not fit, with the likely reason.
    """
    for name, paths in progress(found.items(), 'alignment', len(found), 'pair'):
        gt, lq = (read_image(path) for path in paths)
        require_same_profile(*paths)
        fits = all(side == scale * lq_side for side, lq_side in zip(gt.shape[:2], lq.shape[:2], strict=True))
        if scale > 1:
            _require_order(*paths, gt, lq)
        other_scale = _other_scale(*paths, gt, lq, scale)
        if not fits and not registers:
            raise DataError(
                other_scale
                or f'{paths[1]} is {lq.shape[1]}x{lq.shape[0]}, so {paths[0]} should be {scale} times as large, not '
                f'{gt.shape[1]}x{gt.shape[0]}; --register crops both to their common area.'
            )
        alignment = estimate_alignment(lq, gt, scale)
        # A cropped GT may fit another scale by chance; then the pair still aligns at the scale of the weights.
        if other_scale is not None and (alignment.is_hopeless or abs(alignment.scale - 1) > _ZOOM):
            raise DataError(other_scale)
        if alignment.is_hopeless:
            raise DataError(
                f'{paths[0]} and {paths[1]} do not show the same scene (correlation {alignment.correlation:.2f}); '
                'remove them.'
            )
        if registers:
            try:
                lq, gt = register(lq, gt, scale, alignment)
            except DataError as error:
                raise DataError(f'{paths[0]} and {paths[1]}: {error}') from None
        elif alignment.displacement > _MISALIGNED:
            raise DataError(
                f'{paths[0]} and {paths[1]} are misaligned by up to {alignment.displacement:.1f} LQ pixels; align '
                'them with --register, or remove them.'
            )
        yield name, alignment, (gt, lq)


def _require_order(gt_path: Path, lq_path: Path, gt: np.ndarray, lq: np.ndarray) -> None:
    """Raise DataError if the LQ image is clearly larger than the GT image, which registration cannot fix."""
    if all(side < (1 - _NEARLY) * lq_side for side, lq_side in zip(gt.shape[:2], lq.shape[:2], strict=True)):
        same = gt_path.parent == lq_path.parent
        what = 'files' if same else f'folders {gt_path.parent} and {lq_path.parent}'
        raise DataError(
            f'--pairs: {lq_path}, the LQ, is {lq.shape[1]}x{lq.shape[0]}, larger than {gt_path}, its GT, of '
            f'{gt.shape[1]}x{gt.shape[0]}; are the {what} swapped?'
        )


def _other_scale(gt_path: Path, lq_path: Path, gt: np.ndarray, lq: np.ndarray, scale: int) -> str | None:
    """The error message for a pair whose width and height both fit another scale than that of the weights."""
    ratios = [side / lq_side for side, lq_side in zip(gt.shape[:2], lq.shape[:2], strict=True)]
    found = round(ratios[0])
    if found in (0, scale) or any(abs(ratio - found) > _NEARLY for ratio in ratios):
        return None
    return (
        f'--pairs: {gt_path} is {gt.shape[1]}x{gt.shape[0]}, {lq_path} is {lq.shape[1]}x{lq.shape[0]}: these pairs are '
        f'x{found}, but the weights are for x{scale}; use weights for x{found}, or pairs for x{scale}.'
    )


def alignment_table(alignments: Mapping[str, Alignment]) -> list[str]:
    """Markdown lines: the alignment of each pair."""
    lines = ['Position of the LQ image in the GT image, in GT pixels:', '']
    lines += ['| pair | right | down | scale | correlation |', '|---|---|---|---|---|']
    for name, alignment in alignments.items():
        right, down = alignment.shift
        lines.append(f'| {name} | {right:+.2f} | {down:+.2f} | {alignment.scale:.4f} | {alignment.correlation:.3f} |')
    return lines


def write_pairs(images: Mapping[str, Pair], folder: Path) -> None:
    """Write the images as ``gt/NAME.png`` and ``lq/NAME.png``."""
    for i, side in enumerate(('gt', 'lq')):
        (folder / side).mkdir(parents=True)
        for name, pair in images.items():
            (folder / side / f'{name}.png').write_bytes(cv2.imencode('.png', pair[i])[1].tobytes())
