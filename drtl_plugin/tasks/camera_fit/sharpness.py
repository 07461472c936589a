"""Sharpness of the pairs' GT, relative to the auxiliary photographs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Frequencies, in cycles per pixel, at which sharpness is compared: above most differences of content, below noise.
_BAND = (0.1, 0.35)


def soften(img: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``(B, 3, H, W)``, sigma in pixels; unchanged below 0.25, where a sampled Gaussian is one tap."""
    if sigma < 0.25:
        return img
    # For patches, two products with a band matrix are several times as fast as a convolution.
    rows, columns = (_blurring(extent, sigma).to(img, non_blocking=True) for extent in img.shape[-2:])
    return rows.T @ img @ columns


@functools.lru_cache(maxsize=8)  # a run blurs patches of one size by one sigma
def _blurring(extent: int, sigma: float) -> Tensor:
    """Matrix ``(n, n)`` that blurs rows of n pixels, mirrored at their ends."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1).double() ** 2) / (2 * sigma**2))
    impulses = F.pad(torch.eye(extent, dtype=torch.float64)[:, None], (radius, radius), mode='reflect')
    return F.conv1d(impulses, (kernel / kernel.sum())[None, None])[:, 0]


def _spectrum(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power of the brightness of ``(P, 3, n, n)``, and squared frequencies in (cycles per pixel)²; both flat."""
    side = patches.shape[-1]
    brightness = patches.mean(dim=1)
    window = torch.hann_window(side, periodic=False, dtype=patches.dtype)
    windowed = (brightness - brightness.mean(dim=(1, 2), keepdim=True)) * torch.outer(window, window)
    power = torch.fft.rfft2(windowed).abs().square().mean(dim=0)
    squared = torch.fft.fftfreq(side, dtype=patches.dtype)[:, None] ** 2 + torch.fft.rfftfreq(side).to(patches) ** 2
    return power.flatten(), squared.flatten()


def relative_softness(gts: Sequence[Tensor], photographs: Tensor) -> float:
    """Sigma, in pixels, of the Gaussian that makes photographs as soft as GT; 0 if GT is sharper.

    A Gaussian of sigma σ multiplies power by ``exp(-4π²σ²f²)``; σ follows from the slope of the log ratio of spectra
    (ours).

    Args:
        gts (Sequence[Tensor]): ``(3, H, W)`` each, float64.
        photographs (Tensor): ``(P, 3, H, W)``, float64.
    """
    side = min(photographs.shape[-1], *(extent for gt in gts for extent in gt.shape[-2:]))
    tiles = [gt.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1) for gt in gts]
    soft, squared = _spectrum(torch.cat(tiles))
    sharp, _ = _spectrum(photographs[..., :side, :side])
    band = (squared > _BAND[0] ** 2) & (squared < _BAND[1] ** 2)
    ratio, squared = (soft[band] / sharp[band].clamp_min(1e-12)).clamp_min(1e-12).log(), squared[band]
    squared = squared - squared.mean()
    slope = (squared * ratio).sum() / squared.square().sum()
    return math.sqrt(max(-slope.item(), 0)) / (2 * math.pi)
