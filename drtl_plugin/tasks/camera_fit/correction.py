"""A small network for what a kernel and a tone curve cannot model: sharpening, denoising, demosaicing, moiré.

Three convolutions predict the residual of the model from the GT around an LQ pixel. They train on the K pairs in
seconds, and are used only if they also explain a pair that was left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from drtl_plugin.runtime.progress import progress
from drtl_plugin.tasks.camera_fit.kernel import quarters
from drtl_plugin.tasks.patches import random_crop

# Weight and bias of each convolution in turn; empty: no correction.
Correction = tuple[Tensor, ...]
# GT (3, s h, s w), the model's LQ and the camera's LQ (3, h, w).
Example = tuple[Tensor, Tensor, Tensor]

_CHANNELS = 32
# Width of the border that three 3 x 3 convolutions cannot compute.
_MARGIN = 3
_STEPS, _LR = 300, 2e-3
_BATCH, _SIDE = 16, 32
# Share of the error on unseen pixels that a part of a camera fit must explain to be worth using.
WORTHWHILE = 0.05


def correct(correction: Correction, gt: Tensor, model: Tensor) -> Tensor:
    """Correct the model of the LQ image.

    Args:
        correction (Correction): From :func:`train_correction`; not empty.
        gt (Tensor): ``(B, 3, s h, s w)``, RGB in [0, 1].
        model (Tensor): ``(B, 3, h, w)``: ``gt`` after kernel and tone curve.

    Returns:
        Tensor: ``(B, 3, h, w)``, not clipped.
    """
    scale = gt.shape[-1] // model.shape[-1]
    # The s x s GT pixels of each LQ pixel, relative to the model's value.
    detail = F.pixel_unshuffle(gt, scale) - model.repeat_interleave(scale**2, dim=1)
    features = F.pad(torch.cat([detail, model], dim=1), (len(correction) // 2,) * 4, mode='replicate')
    tensors = [tensor.to(gt, non_blocking=True) for tensor in correction]
    *hidden, (weight, bias) = zip(tensors[::2], tensors[1::2], strict=True)
    for hidden_weight, hidden_bias in hidden:
        features = F.conv2d(features, hidden_weight, hidden_bias).relu()
    return model + F.conv2d(features, weight, bias)


def train_correction(examples: Sequence[Example], generator: torch.Generator) -> Correction:
    """Train a correction by mean squared error.

    Args:
        examples (Sequence[Example]): Training examples.
        generator (torch.Generator): On the CPU.
    """
    scale = examples[0][0].shape[-1] // examples[0][1].shape[-1]
    widths = (3 * scale**2 + 3, _CHANNELS, _CHANNELS, 3)
    correction: list[Tensor] = []
    for before, after in itertools.pairwise(widths):
        spread = math.sqrt(2 / (9 * before)) if len(correction) < 4 else 0.0  # starts as no correction
        weight = torch.randn(after, before, 3, 3, generator=generator) * spread
        correction += [weight.to(memory_format=torch.channels_last), torch.zeros(after)]
    for parameter in correction:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(correction, lr=_LR)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=_STEPS)
    side = min(_SIDE, *(extent for _, model, _ in examples for extent in model.shape[-2:]))
    for _ in progress(range(_STEPS), 'camera fit, correction', _STEPS):
        drawn = torch.randint(0, len(examples), (_BATCH,), generator=generator).tolist()
        crops = [
            random_crop([model, lq, gt], [side, side, side * scale], generator)
            for gt, model, lq in (examples[i] for i in drawn)
        ]
        model, lq, gt = (torch.stack(images) for images in zip(*crops, strict=True))
        optimizer.zero_grad()
        inner = slice(_MARGIN, -_MARGIN)
        F.mse_loss(correct(tuple(correction), gt, model)[..., inner, inner], lq[..., inner, inner]).backward()
        optimizer.step()
        scheduler.step()
    return tuple(p.detach().contiguous() for p in correction)


@torch.no_grad()
def share_left(correction: Correction, examples: Sequence[Example]) -> float:
    """Squared error with a correction, as a share of that without."""
    before = after = 0.0
    for gt, model, lq in examples:
        before += (lq - model).square().sum().item()
        after += (lq - correct(correction, gt[None], model[None])[0]).square().sum().item()
    return after / max(before, 1e-12)


def fit_correction(
    gts: Sequence[Tensor], models: Sequence[Tensor], lqs: Sequence[Tensor]
) -> tuple[Correction, float, float]:
    """Fit a correction, and keep it only if it explains a left-out pair (a quarter, if there is one pair).

    Args:
        gts (Sequence[Tensor]): ``(3, s h, s w)`` each.
        models, lqs (Sequence[Tensor]): ``(3, h, w)`` each.

    Returns:
        tuple[Correction, float, float]: The correction, or an empty one; the share of the squared error that remains
        on all pairs, and on the left-out one.
    """
    parts = [(gt.float(), z.float(), lq.float()) for gt, z, lq in zip(gts, models, lqs, strict=True)]
    if len(parts) == 1:
        gt, model, lq = parts[0]
        parts = [(part, z, y) for (y, part), (z, _) in zip(quarters(lq, gt), quarters(model, gt), strict=True)]
    generator = torch.Generator().manual_seed(0)
    left_of_unseen = share_left(train_correction(parts[:-1], generator), parts[-1:])
    if left_of_unseen > 1 - WORTHWHILE:
        return (), 1.0, 1.0
    correction = train_correction(parts, generator)
    return correction, share_left(correction, parts), left_of_unseen
