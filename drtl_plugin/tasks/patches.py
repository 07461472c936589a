"""Random crops of images and pairs, and their augmentation, drawn from an explicit generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def augment(images: Sequence[Tensor], generator: torch.Generator, hflip: bool = True, rot: bool = True) -> list[Tensor]:
    """Flip and transpose all images alike, like BasicSR's ``augment``.

    Args:
        images (Sequence[Tensor]): Each ``(C, H, W)``.
        generator (torch.Generator): On the CPU.
        hflip (bool): Flip horizontally with probability 1/2.
        rot (bool): Flip vertically and transpose, each with probability 1/2.

    Returns:
        list[Tensor]: Views of the images.
    """
    flips = torch.rand(3, generator=generator) < 0.5
    result = []
    for image in images:
        if hflip and flips[0]:
            image = image.flip(-1)
        if rot and flips[1]:
            image = image.flip(-2)
        if rot and flips[2]:
            image = image.transpose(-1, -2)
        result.append(image)
    return result


def random_crop(images: Sequence[Tensor], sides: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """Crop images of one scene at the same position.

    Args:
        images (Sequence[Tensor]): Each ``(C, H, W)``; the position is drawn on the grid of the first one, and
            the sizes of the others are integer multiples of its size.
        sides (Sequence[int]): Side of the square crop of each image, in the same proportion.
        generator (torch.Generator): On the CPU.

    Returns:
        list[Tensor]: Views of ``(C, side, side)``.
    """
    corner = [int(torch.randint(0, extent - sides[0] + 1, (), generator=generator)) for extent in images[0].shape[-2:]]
    result = []
    for image, side in zip(images, sides, strict=True):
        top, left = (c * side // sides[0] for c in corner)
        result.append(image[..., top : top + side, left : left + side])
    return result


def paired_patches(
    pairs: Sequence[tuple[Tensor, Tensor]],
    num: int,
    lq_size: int,
    generator: torch.Generator,
    hflip: bool = True,
    rot: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draw aligned patches from pairs.

    Args:
        pairs (Sequence[tuple[Tensor, Tensor]]): ``(lq, gt)``, uint8, ``(C, H, W)`` and ``(C, sH, sW)``.
        num (int): Number of patches; pairs are used in turn, in random order.
        lq_size (int): Side of the LQ patches, at most that of the smallest pair.
        generator (torch.Generator): On the CPU.
        hflip, rot (bool): As in :func:`augment`.

    Returns:
        tuple[Tensor, Tensor]: ``(num, C, lq_size, lq_size)`` and ``(num, C, s lq_size, s lq_size)`` in [0, 1].
    """
    scale = pairs[0][1].shape[-1] // pairs[0][0].shape[-1]
    lq_size = min(lq_size, *(extent for lq, _ in pairs for extent in lq.shape[-2:]))
    order = torch.randperm(len(pairs), generator=generator).tolist()
    patches = []
    for i in range(num):
        crop = random_crop(pairs[order[i % len(pairs)]], (lq_size, lq_size * scale), generator)
        patches.append(augment(crop, generator, hflip, rot))
    lq, gt = (torch.stack(images) / 255 for images in zip(*patches, strict=True))
    return lq, gt


def mixed_up(batch: tuple[Tensor, Tensor], probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup: replace each patch, with a probability, by a random mixture of it and another one of the batch.

    Zhang et al. (ICLR 2018, arXiv 1710.09412); for restoration, Yoo et al. (CVPR 2020, arXiv 2004.00448). Mixing
    coefficients are uniform in [0, 1]; here, the other patch is the one before.

    Args:
        batch (tuple[Tensor, Tensor]): ``lq`` and ``gt``, ``(B, C, H, W)``.
        probability (float): Of a patch to be mixed.
        generator (torch.Generator): On the CPU.
    """
    num = len(batch[0])
    coefficients = torch.rand(num, 1, 1, 1, generator=generator)
    is_kept = torch.rand(num, 1, 1, 1, generator=generator) >= probability
    coefficients = coefficients.masked_fill(is_kept, 1)
    lq, gt = (images.roll(1, 0).lerp(images, coefficients.to(images.device)) for images in batch)
    return lq, gt


def with_channels_permuted(
    batch: tuple[Tensor, Tensor], probability: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Permute the colours of each patch, with a probability (Yoo et al., CVPR 2020, arXiv 2004.00448).

    Args:
        batch (tuple[Tensor, Tensor]): ``lq`` and ``gt``, ``(B, C, H, W)``.
        probability (float): Of a patch to have its colours drawn in random order, which may be the old one.
        generator (torch.Generator): On the CPU.
    """
    num, channels = batch[0].shape[:2]
    orders = torch.rand(num, channels, generator=generator).argsort(1)
    is_kept = torch.rand(num, 1, generator=generator) >= probability
    orders = torch.where(is_kept, torch.arange(channels), orders)[:, :, None, None]
    lq, gt = (images.gather(1, orders.to(images.device).expand_as(images)) for images in batch)
    return lq, gt
