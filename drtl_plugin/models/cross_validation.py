"""Adaptation by cross-validation: pairs that were held out choose the settings, and weigh the result.

The scheme is ours. It needs no run that judges itself by what it has seen, and each run does double duty: it judges on
the pairs held out from it, and takes part in the average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from drtl_plugin.meta.adaptation import blend

# Pairs of images (lq, gt).
Pairs = Sequence[tuple[Tensor, Tensor]]
# How far to go from the network before adaptation to the average of the adapted ones. 0 keeps it as it is.
SHARES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# How many folds choose the learning rate.
NUM_JUDGES = 2
# Fewer pairs than this are cut into _NUM_CUTS parts.
_FEW, _NUM_CUTS = 3, 4


@dataclass(frozen=True)
class Part:
    """A pair, or a part of one.

    Attributes:
        pair (int): Its index.
        top, left, height, width (int): Where it is, in LQ pixels.
    """

    pair: int
    top: int
    left: int
    height: int
    width: int

    def region(self, factor: int) -> tuple[slice, slice]:
        """Its rows and columns in the LQ image (``factor`` 1) or in the GT image (``factor``: the scale)."""
        top, left, height, width = (factor * extent for extent in (self.top, self.left, self.height, self.width))
        return slice(top, top + height), slice(left, left + width)


def folds_of(sizes: Sequence[tuple[int, int]], num: int) -> list[list[Part]]:
    """Divide pairs into folds: whole pairs, or, of one or two pairs, their quarters or halves.

    Args:
        sizes (Sequence[tuple[int, int]]): Height and width of each LQ image.
        num (int): The most folds.

    Returns:
        list[list[Part]]: At least two folds, whose parts together cover all pairs once.
    """
    if len(sizes) >= _FEW:
        parts = [Part(pair, 0, 0, *size) for pair, size in enumerate(sizes)]
        return [parts[fold::num] for fold in range(min(num, len(parts)))]
    parts = []
    for pair, (height, width) in enumerate(sizes):
        rows = 2 if len(sizes) == 1 or height > width else 1
        columns = _NUM_CUTS // len(sizes) // rows
        tall, wide = height // rows, width // columns
        parts += [Part(pair, row * tall, column * wide, tall, wide) for row in range(rows) for column in range(columns)]
    return [[part] for part in parts]


def num_runs(num_rates: int, num_folds: int, num_judges: int = NUM_JUDGES) -> int:
    """The number of adaptations in :func:`cross_validate`: one for each fold, and other rates on those that judge."""
    return num_folds + (num_rates - 1) * min(num_judges, num_folds)


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried on the first folds.

    Attributes:
        lr (float): The rate.
        losses (Mapping[float, float]): Loss on held-out patches by share, relative to that before adaptation.
    """

    lr: float
    losses: Mapping[float, float]

    @property
    def loss(self) -> float:
        """The lowest of its losses."""
        return min(self.losses.values())


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """What held-out pairs have chosen, and the networks that it was chosen by.

    Attributes:
        trials (Sequence[Trial]): All rates that were tried.
        lr (float): The rate chosen.
        losses (Mapping[float, float]): Loss on the held-out patches of all folds by share, relative to that before
            adaptation.
        share (float): The share chosen.
        folds (Sequence[Sequence[Part]]): What was held out from each network.
        networks (Sequence[nn.Module]): The network of each fold, a step of ``share`` towards the adapted one.
        result (nn.Module): A step of ``share`` towards the average of the adapted networks.
    """

    trials: Sequence[Trial]
    lr: float
    losses: Mapping[float, float]
    share: float
    folds: Sequence[Sequence[Part]]
    networks: Sequence[nn.Module]
    result: nn.Module

    def in_words(self) -> str:
        """What was chosen, in a sentence."""
        if self.share == 0:
            return 'On held-out pairs, no adaptation was better than none: the weights stay as they were.'
        return (
            f'Chosen on held-out pairs: learning rate {self.lr:g}, and {self.share:.0%} of the way to the average of '
            f'{len(self.folds)} adapted networks (held-out loss: {self.losses[self.share]:.3f} of that before).'
        )


def cross_validate(
    net: nn.Module,
    folds: Sequence[Sequence[Part]],
    rates: Sequence[float],
    adapted: Callable[[int, float], nn.Module],
    loss: Callable[[nn.Module, int], float],
    num_judges: int,
) -> CrossValidation:
    """Choose the rate on the first folds, adapt once for each fold, and average.

    Args:
        net (nn.Module): The network before adaptation; not changed.
        folds (Sequence[Sequence[Part]]): From :func:`folds_of`.
        rates (Sequence[float]): Learning rates to try; of equally good ones, the first is taken.
        adapted (Callable): ``adapted(fold, lr)``: the network adapted to all pairs but those of the fold.
        loss (Callable): ``loss(net, fold)``: the loss of a network in evaluation mode on patches of the fold, not
            negative.
        num_judges (int): How many folds choose the rate.
    """

    def losses_of(other: nn.Module, fold: int) -> dict[float, float]:
        losses = {share: loss(blend(net, [other], share), fold) for share in SHARES}
        # An adaptation that ends in NaN, which compares with nothing, must not be chosen.
        return {share: math.inf if math.isnan(value) else value for share, value in losses.items()}

    def relative(judged: Sequence[dict[float, float]]) -> dict[float, float]:
        # The sum of the losses, not the mean of their ratios: a fold that the network restores almost perfectly before
        # adaptation would have the largest ratios, and outweigh all others.
        sums = {share: sum(losses[share] for losses in judged) for share in SHARES}
        return {share: value / max(sums[0], 1e-12) for share, value in sums.items()}

    judges = range(min(num_judges, len(folds)))
    tried = {lr: [adapted(fold, lr) for fold in judges] for lr in rates}
    tried_losses = {lr: [losses_of(tried[lr][fold], fold) for fold in judges] for lr in rates}
    trials = [Trial(lr, relative(judged)) for lr, judged in tried_losses.items()]
    lr = min(trials, key=lambda trial: trial.loss).lr
    networks = [*tried[lr], *(adapted(fold, lr) for fold in range(len(judges), len(folds)))]
    others = [losses_of(networks[fold], fold) for fold in range(len(judges), len(folds))]
    losses = relative([*tried_losses[lr], *others])
    share = min(losses, key=lambda candidate: losses[candidate])
    return CrossValidation(
        trials,
        lr,
        losses,
        share,
        folds,
        [blend(net, [other], share) for other in networks],
        blend(net, networks, share),
    )
