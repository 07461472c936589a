"""Gradient weights from relations, and the effective number of tasks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def effective_number(weights: Tensor) -> float:
    """``exp(entropy)`` of weights ``(N,)``: N if they are equal, 1 if one task has all the weight (ours)."""
    p = weights.double() / weights.double().sum()
    return math.exp(-torch.xlogy(p, p).sum().item())


def relation_weights(
    relation: Tensor, effective_tasks: float = 6.0, temperature: float | None = None, floor: float = 0.0
) -> Tensor:
    """``w = N [(1 - φ) softmax(r / τ) + φ / N]``: gradient weights of mean 1.

    The paper (arXiv 2111.13078) names gradient weighting; the softmax is our reconstruction; floor and effective number
    of tasks are ours.

    Estimators differ in the scale of r, so one temperature does not suit all of them. Unless τ is given, it is solved
    for such that ``exp(entropy(softmax(r / τ)))`` is the wanted effective number of tasks.

    Args:
        relation (Tensor): r, ``(N,)``.
        effective_tasks (float): Effective number of tasks before the floor; N or more gives equal weights.
        temperature (float | None): τ; overrides ``effective_tasks``.
        floor (float): φ in [0, 1], the share of the weight that is spread evenly over all tasks.

    Returns:
        Tensor: ``(N,)``, mean 1.
    """
    r = relation.double()
    num = len(r)
    if temperature is None:
        softmax = _softmax_of_effective_number(r, min(effective_tasks, num))
    else:
        softmax = torch.softmax(r / temperature, dim=0)
    return (num * (1 - floor) * softmax + floor).to(relation.dtype)


def reserve_share(weights: Tensor, share: float | None) -> Tensor:
    """Reserve a share of the total weight for the last task, the camera fit; the rest is divided as before.

    Ours; the paper has no camera fit.

    Args:
        weights (Tensor): ``(N,)``, mean 1.
        share (float | None): In [0, 1]; None reserves nothing.

    Returns:
        Tensor: ``(N,)``, mean 1; the last task's own weight, scaled by ``1 - share``, adds to its share.
    """
    if share is None:
        return weights
    weights = (1 - share) * weights
    weights[-1] += share * len(weights)
    return weights


def _softmax_of_effective_number(r: Tensor, effective_tasks: float) -> Tensor:
    """Bisect over log τ: the effective number grows with τ, from the number of maxima to N."""
    spread = (r.max() - r.min()).item()
    if spread == 0 or effective_tasks >= len(r):
        return torch.full_like(r, 1 / len(r))
    low, high = math.log(spread) - 10, math.log(spread) + 10
    for _ in range(60):
        middle = (low + high) / 2
        if effective_number(torch.softmax(r / math.exp(middle), dim=0)) < effective_tasks:
            low = middle
        else:
            high = middle
    return torch.softmax(r / math.exp(high), dim=0)
