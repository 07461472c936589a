"""Compositions of distortions that are drawn from the whole parameter space of the library."""

from __future__ import annotations

import math
from typing import Any

import torch


def random_composition(scale: int, generator: torch.Generator) -> dict[str, Any]:
    """Draw a composition with narrow ranges: blur, the reduction, noise, sharpening, JPEG (ours).

    Blur, noise, sharpening and JPEG are part of it with probabilities of 0.75, 0.7, 0.3 and 0.5. The centres of the
    ranges are drawn log-uniformly; blur widths are proportional to the scale.

    Args:
        scale (int): Reduction factor.
        generator (torch.Generator): On the CPU.

    Returns:
        dict: An entry as in an option file.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def around(low: float, high: float, spread: float = 0.08) -> list[float]:
        centre = math.exp(uniform(math.log(low), math.log(high)))
        return [round(centre * (1 - spread), 4), round(centre * (1 + spread), 4)]

    kernel_size = max(21, 2 * math.ceil(2.7 * scale) + 1)  # three times the widest sigma
    width = (0.15 * scale, 0.8 * scale)
    blurs: list[dict[str, Any]] = [
        {'name': 'gaussian_blur', 'sigma': around(*width)},
        {'name': 'gaussian_blur', 'sigma': around(*width)},
        {'name': 'anisotropic_blur', 'sigma_x': around(*width), 'sigma_y': around(*width)},
        {'name': 'plateau_blur', 'sigma': around(*width)},
        {'name': 'sinc', 'cutoff': around(0.8 * math.pi / scale, 0.9 * min(1.8 / scale, 1) * math.pi)},
    ]
    noises: list[dict[str, Any]] = [
        {'name': 'gaussian_noise', 'sigma': around(1, 18)},
        {'name': 'poisson_noise', 'strength': around(0.2, 2.5)},
    ]
    steps: list[dict[str, Any]] = []
    if uniform(0, 1) < 0.75:
        steps.append({**blurs[int(uniform(0, len(blurs)))], 'kernel_size': kernel_size})
    steps.append({'name': 'bicubic'})
    if uniform(0, 1) < 0.7:
        steps.append(noises[int(uniform(0, len(noises)))])
    if uniform(0, 1) < 0.3:
        steps.append({'name': 'sharpen', 'weight': around(0.2, 1.5)})
    if uniform(0, 1) < 0.5:
        steps.append({'name': 'jpeg', 'quality': around(35, 93, 0.05)})
    return {'name': 'compose', 'steps': steps}
