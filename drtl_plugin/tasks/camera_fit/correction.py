"""What a camera does that a kernel and a tone curve cannot say: sharpening, denoising, demosaicing, moiré.

A network of three small convolutions sees the ground truth around a low-quality pixel and what the kernel makes of it,
and says what is missing. It is trained on the residual of a handful of pairs, in seconds, and kept only where it
explains pairs that it has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from drtl_plugin.runtime.progress import progress
from drtl_plugin.tasks.patches import random_crop

# Convolution weights and biases in turn.
Correction = tuple[Tensor, ...]
# Ground truth (3, s h, s w), what the kernel makes of it and what the camera made of it, (3, h, w) each.
Example = tuple[Tensor, Tensor, Tensor]

_CHANNELS = 32
# Pixels at each border that three 3 x 3 convolutions take.
_MARGIN = 3
_STEPS, _LR = 300, 2e-3
_BATCH, _SIDE = 16, 32


def correct(correction: Correction, gt: Tensor, model: Tensor) -> Tensor:
    """The model of the low-quality image, corrected.

    Args:
        correction (Correction): From :func:`train_correction`.
        gt (Tensor): ``(B, 3, s h, s w)``, RGB in [0, 1].
        model (Tensor): ``(B, 3, h, w)``: what kernel and tone curve make of it.

    Returns:
        Tensor: ``(B, 3, h, w)``, not clipped.
    """
    scale = gt.shape[-1] // model.shape[-1]
    # Detail is what matters: the s x s pixels around each pixel, against the model's.
    detail = F.pixel_unshuffle(gt, scale) - model.repeat_interleave(scale**2, dim=1)
    features = F.pad(torch.cat([detail, model], dim=1), (len(correction) // 2,) * 4, mode='replicate')
    tensors = [tensor.to(gt, non_blocking=True) for tensor in correction]
    *hidden, (weight, bias) = zip(tensors[::2], tensors[1::2])
    for hidden_weight, hidden_bias in hidden:
        features = F.conv2d(features, hidden_weight, hidden_bias).relu()
    return model + F.conv2d(features, weight, bias)


def train_correction(examples: Sequence[Example], generator: torch.Generator) -> Correction:
    """Train a correction by mean squared error, whose minimum is the mean of what the camera may make of a scene.

    Args:
        examples (Sequence[Example]): To learn from.
        generator (torch.Generator): On the CPU.
    """
    scale = examples[0][0].shape[-1] // examples[0][1].shape[-1]
    widths = (3 * scale**2 + 3, _CHANNELS, _CHANNELS, 3)
    correction = []
    for before, after in zip(widths, widths[1:]):
        spread = math.sqrt(2 / (9 * before)) if len(correction) < 4 else 0.0  # begins with no correction
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
        model, lq, gt = (torch.stack(images) for images in zip(*crops))
        optimizer.zero_grad()
        inner = slice(_MARGIN, -_MARGIN)
        F.mse_loss(correct(tuple(correction), gt, model)[..., inner, inner], lq[..., inner, inner]).backward()
        optimizer.step()
        scheduler.step()
    return tuple(p.detach().contiguous() for p in correction)


@torch.no_grad()
def share_left(correction: Correction, examples: Sequence[Example]) -> float:
    """Squared error that a correction leaves of the model's, over examples."""
    before = after = 0.0
    for gt, model, lq in examples:
        before += (lq - model).square().sum().item()
        after += (lq - correct(correction, gt[None], model[None])[0]).square().sum().item()
    return after / max(before, 1e-12)
