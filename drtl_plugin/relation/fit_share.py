"""The camera fit's reserved share of the gradient weights (ours; the paper has no camera fit)."""

from __future__ import annotations

from torch import Tensor


def reserve_share(weights: Tensor, share: float | None) -> Tensor:
    """Reserve a share of the total weight for the last task; the rest is divided as before.

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
