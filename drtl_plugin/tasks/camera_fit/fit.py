"""Fitting a camera to its pairs: least squares in closed form, and a learned correction.

While the kernel is fitted, each pair has its own gain, offset and sub-pixel shift, since exposure and alignment differ
between pairs. :mod:`drtl_plugin.tasks.camera_fit.model` has the equations.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from drtl_plugin.errors import DataError
from drtl_plugin.runtime.progress import progress
from drtl_plugin.tasks.camera_fit.correction import correct, fit_correction
from drtl_plugin.tasks.camera_fit.kernel import Pair, equations, kernel_size, quarters, reduce_by, solve
from drtl_plugin.tasks.camera_fit.model import CameraFit
from drtl_plugin.tasks.camera_fit.noise import fit_noise
from drtl_plugin.tasks.camera_fit.sharpness import relative_softness
from drtl_plugin.tasks.camera_fit.tone import apply_tone, fit_level, fit_tone, per_colour

# Alternations between the kernel and the pairs' shifts, gains and offsets.
_ROUNDS = 3
# Side, in GT pixels, of the centre of large pairs that is fitted to.
_LARGEST = 768


def check_pairs(pairs: Sequence[Pair]) -> None:
    """Check that a camera can be fitted to pairs.

    Args:
        pairs (Sequence[tuple[Tensor, Tensor]]): K pairs ``(lq, gt)``, uint8, ``(3, h, w)`` and ``(3, s h, s w)``, RGB.

    Raises:
        DataError: If a side of a GT image is below four kernel widths (quarters must hold a kernel), or if a colour is
            black in all LQ or all GT images; it names the colour.
    """
    taps = kernel_size(_scale(pairs))
    if min(min(gt.shape[-2:]) for _, gt in pairs) < 4 * taps:
        raise DataError(f'a camera fit needs GT images of at least {4 * taps} pixels a side.')
    for side, images in zip(('LQ', 'GT'), zip(*pairs, strict=True), strict=True):
        lit = functools.reduce(operator.or_, (image.flatten(1).any(dim=1) for image in images)).tolist()
        if not all(lit):
            black = ', '.join(name for name, is_lit in zip(('red', 'green', 'blue'), lit, strict=True) if not is_lit)
            raise DataError(f'a camera cannot be fitted: all {side} images are black in {black}.')


def fit_camera(pairs: Sequence[Pair], photographs: Tensor) -> CameraFit:
    """Fit a camera to aligned pairs.

    Args:
        pairs (Sequence[tuple[Tensor, Tensor]]): K pairs ``(lq, gt)``, uint8, ``(3, h, w)`` and ``(3, s h, s w)``, RGB.
        photographs (Tensor): ``(P, 3, H, W)`` in [0, 1]: auxiliary photographs, of ordinary sharpness.

    Returns:
        CameraFit: Its ``warnings()`` say whether to trust it.

    Raises:
        DataError: See :func:`check_pairs`.
    """
    check_pairs(pairs)
    scale = _scale(pairs)
    taps = kernel_size(scale)
    lqs, gts = zip(*(_middle(lq.double() / 255, gt.double() / 255) for lq, gt in pairs), strict=True)
    shift = torch.zeros(len(pairs), 2, dtype=torch.float64)
    gain, offset = torch.ones(len(pairs), 3).double(), torch.zeros(len(pairs), 3).double()
    for _ in progress(range(_ROUNDS), 'camera fit, kernel', _ROUNDS, 'round'):
        shifted = [_shifted(gt, move) for gt, move in zip(gts, shift, strict=True)]
        levelled = [(lq - per_colour(o)) / per_colour(a) for lq, a, o in zip(lqs, gain, offset, strict=True)]
        parts: list[Pair] = (
            list(zip(levelled, shifted, strict=True)) if len(pairs) > 1 else quarters(levelled[0], shifted[0])
        )
        kernel, explained, explained_left_out = solve([equations(lq, gt, taps) for lq, gt in parts], taps)
        reduced = [reduce_by(gt[None], kernel, scale)[0] for gt in shifted]
        models = []
        for p, (lq, z) in enumerate(zip(lqs, reduced, strict=True)):
            gain[p], offset[p] = fit_level(z, lq)
            models.append(z * per_colour(gain[p]) + per_colour(offset[p]))
            shift[p] += _remaining_shift(models[p], lq) * scale
        shift -= shift.mean(dim=0)
    tone = fit_tone(reduced, lqs)
    toned = [apply_tone(tone, z[None])[0] for z in reduced]
    levels = [fit_level(z, lq) for z, lq in zip(toned, lqs, strict=True)]
    levelled = [(lq - per_colour(o)) / per_colour(a) for lq, (a, o) in zip(lqs, levels, strict=True)]
    correction, left, left_of_unseen = fit_correction(shifted, toned, levelled)
    if correction:
        toned = [correct(correction, gt[None], z[None])[0] for gt, z in zip(shifted, toned, strict=True)]
    models = [z * per_colour(a) + per_colour(o) for z, (a, o) in zip(toned, levels, strict=True)]
    noise, colours, neighbours = fit_noise(models, lqs)
    return CameraFit(
        scale=scale,
        kernel=kernel.float(),
        tone=tone.float(),
        shift=shift.float(),
        noise=noise.float(),
        colour_correlation=colours.float(),
        neighbour_correlation=neighbours,
        gt_sigma=relative_softness(gts, photographs.double()),
        explained=1 - (1 - explained) * left,
        explained_left_out=1 - (1 - explained_left_out) * left_of_unseen,
        correction=correction,
    )


def _scale(pairs: Sequence[Pair]) -> int:
    lq, gt = pairs[0]
    return gt.shape[-1] // lq.shape[-1]


def _middle(lq: Tensor, gt: Tensor) -> Pair:
    """Crop large pairs to their centre, which is enough to fit to."""
    scale = gt.shape[-1] // lq.shape[-1]
    sides = [min(extent, _LARGEST // scale) for extent in lq.shape[-2:]]
    top, left = ((extent - side) // 2 for extent, side in zip(lq.shape[-2:], sides, strict=True))
    return lq[:, top : top + sides[0], left : left + sides[1]], gt[
        :, scale * top : scale * (top + sides[0]), scale * left : scale * (left + sides[1])
    ]


def _shifted(img: Tensor, shift: Tensor) -> Tensor:
    """Shift ``(3, H, W)`` by ``shift`` ``(2,)`` pixels (down, right) in the Fourier domain, mirrored at the borders."""
    height, width = img.shape[-2:]
    mirrored = torch.cat([img, img.flip(-1)], dim=-1)
    mirrored = torch.cat([mirrored, mirrored.flip(-2)], dim=-2)
    down = torch.fft.fftfreq(2 * height, dtype=img.dtype)[:, None] * shift[0]
    right = torch.fft.rfftfreq(2 * width, dtype=img.dtype) * shift[1]
    spectrum = torch.fft.rfft2(mirrored) * torch.exp(-2j * math.pi * (down + right))
    return torch.fft.irfft2(spectrum, s=mirrored.shape[-2:])[..., :height, :width].contiguous()


def _remaining_shift(model: Tensor, lq: Tensor) -> Tensor:
    """Shift ``d`` (down, right) of ``lq`` against ``model``, ``(2,)`` in LQ pixels.

    One Gauss-Newton step: ``lq(x) ≈ model(x) - d · ∇model(x)``.
    """
    slopes = torch.stack([slope.flatten() for slope in torch.gradient(model, dim=(-2, -1))], dim=1)
    return -torch.linalg.lstsq(slopes, (lq - model).flatten()[:, None]).solution[:, 0]
