"""Exposure and tone curve of a camera fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def per_colour(values: Tensor) -> Tensor:
    """``(3,)`` as ``(3, 1, 1)``, to broadcast over images."""
    return values[:, None, None]


def fit_level(model: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and offset ``(3,)`` with ``lq ≈ gain · model + offset`` (least squares), images ``(3, h, w)``."""
    model, lq = model.flatten(1), lq.flatten(1)
    centred = model - model.mean(dim=1, keepdim=True)
    gain = (centred * lq).sum(dim=1) / centred.square().sum(dim=1).clamp_min(1e-12)
    gain = gain.clamp(0.1, 10)  # undefined for images without contrast, and a divisor later on
    return gain, lq.mean(dim=1) - gain * model.mean(dim=1)


def apply_tone(tone: Tensor, reduced: Tensor) -> Tensor:
    """Apply tone curves ``(3, 4)`` to images ``(B, 3, h, w)``."""
    # A polynomial is meaningless outside the range that it was fitted to.
    return torch.einsum('ci,bchwi->bchw', tone, _powers(reduced.clamp(0, 1)))


def _powers(z: Tensor) -> Tensor:
    """1, z, z², z³ in a new last dimension."""
    return torch.stack([z**power for power in range(4)], dim=-1)


def fit_tone(reduced: Sequence[Tensor], lqs: Sequence[Tensor]) -> Tensor:
    """Fit tone curves ``(3, 4)``, cubic polynomials, from reduced GT to LQ, ``(3, h, w)`` each (least squares)."""
    inputs, outputs = (torch.cat([image.flatten(1) for image in images], dim=1) for images in (reduced, lqs))
    return torch.linalg.lstsq(_powers(inputs), outputs[..., None]).solution[..., 0]
