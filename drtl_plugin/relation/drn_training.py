"""Training of a Distortion Relation Network (reconstruction).

Each batch has the same GT patches under every task, so that only the distortion distinguishes them. The GT is disturbed
like that of real pairs: a sub-pixel shift, a slightly different exposure, and noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drtl_plugin.archs.drn_arch import TransferMember
from drtl_plugin.tasks.distortions import bicubic

# Softmax temperature of the cosines; 0.05 to 0.2 gave the same accuracy.
_TEMPERATURE = 0.1


def disturb_gt(gt: Tensor, generator: torch.Generator, scale: int) -> Tensor:
    """Disturb GT like that of real pairs: shift, softness, gain and noise, drawn for each image.

    The softness comes from the bilinear interpolation of the shift: a blur with a sigma of up to 0.5 pixels.

    Args:
        gt (Tensor): ``(B, 3, H, W)`` in [0, 1].
        generator (torch.Generator): Source of the draws.
        scale (int): Shifts are up to 0.15 LQ pixels, i.e. ``0.15 · scale`` GT pixels.

    Returns:
        Tensor: ``(B, 3, H, W)`` in [0, 1].
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device).to(gt)

    num, _, height, width = gt.shape
    theta = torch.eye(2, 3, device=gt.device).repeat(num, 1, 1)
    shift = (2 * draw(num, 2) - 1) * 0.15 * scale
    theta[:, :, 2] = 2 * shift / gt.new_tensor([width, height])  # the image spans [-1, 1]
    grid = F.affine_grid(theta, list(gt.shape), align_corners=False)
    shifted = F.grid_sample(gt, grid, mode='bilinear', padding_mode='reflection', align_corners=False)
    gain = 0.98 + 0.04 * draw(num, 1, 1, 1)
    noise = torch.randn(gt.shape, generator=generator, device=generator.device).to(gt)
    return (shifted * gain + noise * draw(num, 1, 1, 1) * 3 / 255).clamp(0, 1)


def relation_loss(embeddings: Tensor) -> Tensor:
    """Cross-entropy of recognising the task of a GT patch from the knowledge graph's cosines.

    Half of the patches give the tasks' embeddings ``v_i``, centred over the library as in
    :func:`drtl_plugin.relation.graph.graph_from_embeddings`. The other half are queries, one by one and averaged; a
    softmax over their cosines to the ``v_i`` must recognise the task (prototypical networks, Snell et al.,
    arXiv 1703.05175, section 2.3, with the graph's cosine).

    The loss does not require distortions of similar strength to have similar embeddings; with spectra as input, they do
    (``benchmarks/README.md``, blur order).

    Args:
        embeddings (Tensor): ``(N, P, d)``, of P GT patches under each of N tasks; P is at least 2.

    Returns:
        Tensor: The mean of the two cross-entropies, a scalar.
    """
    num_task, num_content, _ = embeddings.shape
    auxiliary, queries = embeddings.split([num_content // 2, num_content - num_content // 2], dim=1)
    auxiliary = auxiliary.mean(dim=1)
    centre = auxiliary.mean(dim=0)
    nodes = F.normalize(auxiliary - centre, dim=1)
    loss = embeddings.new_zeros(())
    for query in (queries, queries.mean(dim=1, keepdim=True)):
        logits = F.normalize(query - centre, dim=2) @ nodes.T / _TEMPERATURE
        task = torch.arange(num_task, device=embeddings.device)[:, None].expand(-1, query.shape[1])
        loss = loss + F.cross_entropy(logits.flatten(0, 1), task.flatten()) / 2
    return loss


def train_drn(
    net: nn.Module, gt: Tensor, lq: Tensor, steps: int, lr: float, batch_size: int, generator: torch.Generator
) -> Iterator[float]:
    """Train a DRN; a generator of losses, so that the caller can show progress.

    Args:
        net (nn.Module): A :class:`DistortionRelationNet`; trained in place.
        gt (Tensor): P GT patches, ``(P, 3, s h, s w)`` in [0, 1].
        lq (Tensor): The same under the N auxiliary tasks, ``(N, P, 3, h, w)`` in [0, 1].
        steps (int): Adam steps, with a cosine schedule.
        lr (float): Initial learning rate.
        batch_size (int): GT patches per step; each is seen under every task.
        generator (torch.Generator): Source of batches and disturbances, on the CPU.

    Yields:
        float: The loss of each step.
    """
    net.train()
    num_task, num_content = lq.shape[:2]
    scale = gt.shape[-1] // lq.shape[-1]
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        chosen = torch.randint(0, num_content, (batch_size,), generator=generator).to(lq.device)
        reduced_gt = bicubic(disturb_gt(gt[chosen], generator, scale), scale)
        embeddings = net(lq[:, chosen].flatten(0, 1), reduced_gt.repeat(num_task, 1, 1, 1))
        loss = relation_loss(embeddings.unflatten(0, (num_task, batch_size)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        yield loss.item()
    net.eval()


@dataclass(frozen=True, eq=False)
class TransferMatrix:
    """Measured transfer between N tasks, and what a DRN sees of them.

    Attributes:
        gains (Tensor): Gain of task i (rows) on task j, ``(N, N)``.
        auxiliary (Tensor): Features of pairs of each task, ``(N, P, num_out)``.
        target (Tensor): The same of pairs of other contents, with their GT disturbed by :func:`disturb_gt`.
    """

    gains: Tensor
    auxiliary: Tensor
    target: Tensor


def train_transfer(
    member: TransferMember, matrices: Sequence[TransferMatrix], steps: int, lr: float, batch_size: int, seed: int
) -> Iterator[float]:
    """Train a member of a ``TransferRelationNet`` to predict gains (ours); a generator of losses.

    Each step predicts the gains of one matrix from a few pairs of each task. Matrices count alike: gains are divided by
    their standard deviation in the loss, and the member is scaled back at the end.

    Args:
        member (TransferMember): Trained in place.
        matrices (Sequence[TransferMatrix]): Of any scales.
        steps (int): AdamW steps, with a cosine schedule.
        lr (float): Initial learning rate.
        batch_size (int): Pairs of each task per step.
        seed (int): Seed of the batches.

    Yields:
        float: The loss of each step, a smooth L1.
    """
    member.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(member.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        matrix = matrices[int(torch.randint(len(matrices), (), generator=generator))]
        auxiliary, target = (
            member.embed(features[:, chosen].flatten(0, 1)).unflatten(0, (-1, batch_size)).mean(dim=1)
            for features in (matrix.auxiliary, matrix.target)
            for chosen in [torch.randint(features.shape[1], (batch_size,), generator=generator)]
        )
        gains = matrix.gains - matrix.gains.mean(dim=0)
        loss = F.smooth_l1_loss(member.gains(auxiliary, target), gains / gains.std())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        yield loss.item()
    strength = torch.stack([matrix.gains.std() for matrix in matrices]).mean()
    with torch.no_grad():
        for linear in (member.key, member.usefulness):
            linear.weight.mul_(strength)
    member.eval()
