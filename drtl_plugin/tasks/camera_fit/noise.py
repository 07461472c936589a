"""The noise of a camera fit: ``Var n = c_0 + c_1 · y + c_2 · |∇y|²``, correlated over colours and neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from basicsr.utils.img_process_util import filter2D
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

# Side, in LQ pixels, of the blocks over which squared residuals are averaged before the fit.
_BLOCK = 4


def synthesise_noise(
    img: Tensor, noise: Tensor, colour_correlation: Tensor, neighbour_correlation: float, generator: torch.Generator
) -> Tensor:
    """Draw noise for images.

    Args:
        img (Tensor): Noise-free LQ images ``(B, 3, h, w)`` in [0, 1].
        noise (Tensor): ``(3, 3)``, see :func:`fit_noise`.
        colour_correlation (Tensor): ``(3, 3)``.
        neighbour_correlation (float): Correlation between adjacent pixels.
        generator (torch.Generator): Source of the noise.

    Returns:
        Tensor: ``(B, 3, h, w)``, to be added to ``img``.
    """
    white = torch.randn(img.shape, generator=generator, device=generator.device).to(img)
    colours = torch.linalg.cholesky(colour_correlation).to(img, non_blocking=True)
    mixed = torch.einsum('ij,bjhw->bihw', colours, white)
    neighbour = _neighbour_tap(neighbour_correlation)
    tap = torch.tensor([neighbour, 1.0, neighbour]).to(img, non_blocking=True)
    tap = tap / tap.norm()
    correlated = filter2D(mixed, torch.outer(tap, tap)[None])
    constant, shot, edges = noise.T.to(img, non_blocking=True)[..., None, None]
    brightness, slope = _brightness_and_slope(img)
    return correlated * (constant + shot * brightness + edges * slope).sqrt()


def fit_noise(models: Sequence[Tensor], lqs: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Fit the noise to the residuals ``lq - model`` of all pairs, ``(3, h, w)`` each, float64.

    Returns:
        tuple[Tensor, Tensor, float]: ``c_0, c_1, c_2`` of each colour ``(3, 3)``, the correlation between colours
        ``(3, 3)``, and that between adjacent pixels.
    """
    residuals = [lq - model for lq, model in zip(lqs, models, strict=True)]
    features = []
    for model in models:
        brightness, slope = _brightness_and_slope(model[None])
        features.append(torch.cat([torch.ones_like(brightness), brightness, slope], dim=1)[0])

    def blocks(images: Sequence[Tensor]) -> Tensor:
        return torch.cat([F.avg_pool2d(image[None], _BLOCK)[0].flatten(1) for image in images], dim=1)

    inputs, energies = blocks(features).T, blocks([residual**2 for residual in residuals])
    rows = []
    for energy in energies:
        weight = torch.ones_like(energy)
        for _ in range(3):  # weighted, since a variance estimate spreads in proportion to the variance
            row = torch.from_numpy(nnls((inputs * weight[:, None]).numpy(), (energy * weight).numpy())[0])
            weight = 1 / (inputs @ row + 1e-3 * energy.mean() + 1e-12)
        rows.append(row)
    noise = torch.stack(rows)
    normal = []
    for residual, feature in zip(residuals, features, strict=True):
        variance = torch.einsum('cf,fhw->chw', noise, feature)
        normal.append(residual / (variance + 1e-9).sqrt())
    colours = torch.corrcoef(torch.cat([z.flatten(1) for z in normal], dim=1))
    colours = colours.nan_to_num().fill_diagonal_(1) * 0.999 + 0.001 * torch.eye(3, dtype=colours.dtype)
    energy = sum(z.square().mean().item() for z in normal)
    down, right = (sum((z * z.roll(1, axis)).mean().item() for z in normal) for axis in (1, 2))
    neighbours = (down + right) / 2 / max(energy, 1e-12)
    return noise, colours, min(max(neighbours, 0.0), 0.7)


def _brightness_and_slope(img: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over colours of ``(B, 3, h, w)`` and its squared gradient, ``(B, 1, h, w)`` each."""
    brightness = img.mean(dim=-3, keepdim=True).clamp_min(0)
    down, right = torch.gradient(brightness, dim=(-2, -1))
    return brightness, down**2 + right**2


def _neighbour_tap(correlation: float) -> float:
    """``t`` for which white noise filtered by [t, 1, t] has the neighbour correlation 2t / (1 + 2t²)."""
    if correlation < 1e-6:
        return 0.0
    return (1 - math.sqrt(1 - 2 * correlation**2)) / (2 * correlation)
