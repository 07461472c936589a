"""How a Distortion Relation Network learns what distortions are alike.

Each batch holds the same contents under every task, so that nothing but the distortion tells patches apart, and a
linear head has to name the task from the embedding. The ground truth beside a patch is disturbed like that of a real
pair: registered to a fraction of a pixel, exposed slightly differently, noisy itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drtl_plugin.relation.estimators import embed_pairs

# Auxiliary pairs: P contents (P, 3, s h, s w), and the same under N tasks (N, P, 3, h, w).
AuxiliaryPairs = tuple[Tensor, Tensor]


def disturb_gt(gt: Tensor, generator: torch.Generator, scale: int) -> Tensor:
    """Disturb ground truth as that of real pairs is: shift, gain, noise; a new draw for each image.

    Args:
        gt (Tensor): ``(B, 3, H, W)`` in [0, 1].
        generator (torch.Generator): Source of the draws.
        scale (int): Shifts are up to 0.15 pixels of the low-quality grid, i.e. ``0.15 scale`` of ``gt``'s.

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


def train_drn(
    net: nn.Module,
    draw_pairs: Callable[[], AuxiliaryPairs],
    num_task: int,
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> Iterator[float]:
    """Train a DRN; a generator, so that the caller shows progress in its own way.

    Args:
        net (nn.Module): A :class:`DistortionRelationNet`; trained in place.
        draw_pairs (Callable): Gives a batch of auxiliary pairs ``(gt (P, 3, s h, s w), lq (N, P, 3, h, w))``.
        num_task (int): N, number of auxiliary tasks.
        steps (int): Adam steps, under a cosine schedule.
        lr (float): Initial learning rate.
        generator (torch.Generator): Source of the disturbances.

    Yields:
        float: The loss of each step.
    """
    net.train()
    slots = net.memory_bank.slots
    head = nn.Linear(slots.shape[1], num_task).to(slots.device)
    for p in head.parameters():  # `generator` stays the only source of chance
        nn.init.zeros_(p)
    groups = [{'params': net.parameters()}, {'params': head.parameters(), 'lr': 5 * lr}]
    optimizer = torch.optim.Adam(groups, lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        gt, lq = draw_pairs()
        task = torch.arange(num_task, device=lq.device).repeat_interleave(lq.shape[1])
        disturbed = disturb_gt(gt.repeat(num_task, 1, 1, 1), generator, gt.shape[-1] // lq.shape[-1])
        loss = F.cross_entropy(head(embed_pairs(net, lq.flatten(0, 1), disturbed)), task)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        yield loss.item()
    net.eval()
