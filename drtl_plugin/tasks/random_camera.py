"""Compositions of distortions that are drawn from the whole parameter space of the library."""

from __future__ import annotations

import math
from typing import Any

import torch


def random_composition(scale: int, generator: torch.Generator, spread: float = 0.0) -> dict[str, Any]:
    """Draw a composition: blur, the reduction, noise, sharpening, JPEG (ours).

    Blur, noise, sharpening and JPEG are part of it with probabilities of 0.75, 0.7, 0.3 and 0.5. Parameters are drawn
    log-uniformly.

    Args:
        scale (int): Reduction factor; blur widths are proportional to it.
        generator (torch.Generator): On the CPU.
        spread (float): Parameters are ranges of this relative half-width around what was drawn, 5/8 of it for
            the quality of JPEG. With 0, they are fixed, and so is the rotation of an anisotropic blur.

    Returns:
        dict: An entry as in an option file.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def around(low: float, high: float, width: float = spread) -> list[float]:
        centre = math.exp(uniform(math.log(low), math.log(high)))
        return [round(centre * (1 - width), 4), round(centre * (1 + width), 4)]

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
        steps.append({'name': 'jpeg', 'quality': around(35, 93, spread * 5 / 8)})
    if not spread:
        for step in steps:
            if step['name'] == 'anisotropic_blur':
                step['rotation'] = uniform(-math.pi, math.pi)
    return {'name': 'compose', 'steps': steps}
