"""The kernel of a camera fit: applying it, and least squares for it on aligned pairs."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from drtl_plugin.tasks.distortions import bicubic

# LQ (3, h, w) and GT (3, s h, s w) of one scene.
Pair = tuple[Tensor, Tensor]

# Regularisation strengths to choose from, as shares of the mean energy of a tap.
_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2)
# About how many LQ pixels of a pair the kernel is fitted to.
_PIXELS = 12_000


def kernel_sigma(kernel: Tensor) -> float:
    """Sigma, in pixels, of the Gaussian with the same energy ``Σ k² = 1 / (4πσ²)`` as a kernel ``(n, n)`` of sum 1.

    The variance would depend most on the outermost taps, which are the least certain.
    """
    return 1 / (2 * math.sqrt(math.pi * kernel.square().sum().item()))


def reduce_by(gt: Tensor, kernel: Tensor, scale: int) -> Tensor:
    """``(k * x) ↓ s``: each LQ pixel is a weighted sum centred on the s × s GT pixels that it covers.

    Args:
        gt (Tensor): ``(B, C, H, W)``; H and W are multiples of ``scale``; padded by reflection.
        kernel (Tensor): ``(C, n, n)``; n and scale are both even or both odd. Not flipped (correlation).
        scale (int): s.

    Returns:
        Tensor: ``(B, C, H / scale, W / scale)``.
    """
    margin = (kernel.shape[-1] - scale) // 2
    padded = F.pad(gt, (margin,) * 4, mode='reflect')
    return F.conv2d(padded, kernel[:, None], stride=scale, groups=len(kernel))


def kernel_size(scale: int) -> int:
    """Side of the kernel in GT pixels: wide enough for lenses at x4, and for what remains of their blur at x2."""
    return max(5 * scale, 14 + scale % 2)


@dataclass(frozen=True, eq=False)
class Equations:
    """Normal equations of the kernel on part of the pairs, per colour.

    Attributes:
        gram (Tensor): ``(3, n², n²)``, of GT neighbourhoods.
        product (Tensor): ``(3, n²)``, of GT neighbourhoods and LQ pixels.
        energy (Tensor): ``(3,)``, of the LQ pixels.
        bicubic_error (float): Squared error of bicubic downsampling.
    """

    gram: Tensor
    product: Tensor
    energy: Tensor
    bicubic_error: float

    def __add__(self, other: Equations) -> Equations:
        return Equations(
            self.gram + other.gram,
            self.product + other.product,
            self.energy + other.energy,
            self.bicubic_error + other.bicubic_error,
        )

    def error(self, kernel: Tensor) -> float:
        """Squared error of kernels ``(3, n²)``."""
        quadratic = torch.einsum('ci,cij,cj->c', kernel, self.gram, kernel)
        return (self.energy - 2 * (kernel * self.product).sum(dim=1) + quadratic).sum().item()


def equations(lq: Tensor, gt: Tensor, taps: int) -> Equations:
    """Normal equations of a pair, without the pixels near the border, whose neighbourhoods are incomplete.

    Args:
        lq (Tensor): ``(3, h, w)``, float64.
        gt (Tensor): ``(3, s h, s w)``, float64.
        taps (int): Side n of the kernel.
    """
    scale = gt.shape[-1] // lq.shape[-1]
    border = math.ceil((taps - scale) / (2 * scale))
    start = border * scale - (taps - scale) // 2
    inner = lq[:, border:-border, border:-border]
    reduced = bicubic(gt[None], scale)[0, :, border:-border, border:-border]
    gram = gt.new_zeros(3, taps**2, taps**2)
    product = gt.new_zeros(3, taps**2)
    # Only every so many rows: neighbouring rows add little, and all of them would take minutes and gigabytes.
    rows = range(0, inner.shape[1], math.ceil(inner[0].numel() / _PIXELS))
    for row in rows:
        top = start + row * scale
        strip = gt[:, None, top : top + taps, start : start + (inner.shape[2] - 1) * scale + taps]
        neighbourhoods = F.unfold(strip, taps, stride=scale)
        gram += neighbourhoods @ neighbourhoods.mT
        product += torch.einsum('cnl,cl->cn', neighbourhoods, inner[:, row])
    inner, reduced = inner[:, rows], reduced[:, rows]
    return Equations(gram, product, inner.square().sum(dim=(1, 2)), (inner - reduced).square().sum().item())


def quarters(lq: Tensor, gt: Tensor) -> list[Pair]:
    """Split a pair into its four quarters."""
    scale = gt.shape[-1] // lq.shape[-1]
    height, width = (extent // 2 for extent in lq.shape[-2:])

    def quarter(image: Tensor, s: int, top: int, left: int) -> Tensor:
        return image[:, top * s * height : (top + 1) * s * height, left * s * width : (left + 1) * s * width]

    places = itertools.product(range(2), range(2))
    return [(quarter(lq, 1, top, left), quarter(gt, scale, top, left)) for top, left in places]


def _regularisation(taps: int) -> Tensor:
    """Penalty ``(n², n²)`` on rough kernels and on taps far from the centre (ours)."""
    centre = (taps - 1) / 2
    axis = (torch.arange(taps, dtype=torch.float64) - centre) / centre
    radius = (axis[:, None] ** 2 + axis**2).flatten()
    unit = torch.eye(taps**2, dtype=torch.float64).view(-1, 1, taps, taps)
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64)
    rough = F.conv2d(unit, laplacian[None, None], padding=1).flatten(1)
    return rough @ rough.T / 4 + torch.diag(0.1 + radius**2)


def solve(parts: Sequence[Equations], taps: int) -> tuple[Tensor, float, float]:
    """Solve for the kernel, with the regularisation that predicts left-out parts best (leave-one-out).

    Args:
        parts (Sequence[Equations]): Pairs, or the quarters of a single pair; at least 2.
        taps (int): Side n of the kernel.

    Returns:
        tuple[Tensor, float, float]: The kernel ``(3, n, n)``, each colour of sum 1, and the share of the squared error
        of bicubic downsampling that it explains, on all parts and on left-out ones.
    """
    total = functools.reduce(operator.add, parts)
    others = [functools.reduce(operator.add, [*parts[:i], *parts[i + 1 :]]) for i in range(len(parts))]
    penalty = _regularisation(taps)

    def kernel_of(equations: Equations, ridge: float) -> Tensor:
        energy = equations.gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-9)  # a pair may be black
        factor = torch.linalg.cholesky(equations.gram + ridge * energy[:, None, None] * penalty)
        return torch.cholesky_solve(equations.product[..., None], factor)[..., 0]

    left_out = {
        ridge: sum(part.error(kernel_of(rest, ridge)) for part, rest in zip(parts, others, strict=True))
        for ridge in _RIDGES
    }
    ridge = min(left_out, key=lambda ridge: left_out[ridge])
    kernel = kernel_of(total, ridge)
    explained, explained_left_out = (
        1 - e / max(total.bicubic_error, 1e-12) for e in (total.error(kernel), left_out[ridge])
    )
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    return kernel.view(3, taps, taps), explained, explained_left_out
