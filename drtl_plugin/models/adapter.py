"""Adapts a network to the target's pairs, with the settings in ``drtl.adapt``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from drtl_plugin.meta.adaptation import Backward, adaptation, best_step, last
from drtl_plugin.meta.learner import Batch, Criterion, Precision
from drtl_plugin.models.cross_validation import (
    NUM_JUDGES,
    CrossValidation,
    Pairs,
    Part,
    cross_validate,
    folds_of,
    num_runs,
)
from drtl_plugin.models.episode_synthesis import Episodes
from drtl_plugin.models.inner_rates import InnerRates
from drtl_plugin.options.sections import AdaptOptions
from drtl_plugin.runtime.progress import progress, stage
from drtl_plugin.tasks.patches import mixed_up, paired_patches, with_channels_permuted

# Patches of the held-out pairs that early stopping judges by.
_NUM_HELD_OUT = 32
# Patches of a fold that cross-validation judges by, and the most that their side may exceed that of training patches.
# Larger ones have less of the border, where every network is worse.
_NUM_JUDGED, _LARGER = 16, 4


def _ticks(name: str, steps: int) -> Iterator[int]:
    """Progress that is shown as it is iterated over."""
    return progress(range(steps), name, steps)


def _plain_backward(loss: Tensor, output: Tensor, gt: Tensor) -> None:
    torch.autograd.backward(loss)


@dataclass(eq=False)
class Adapter:
    """Few-shot adaptation: batches of target and replayed patches, the number of steps, and the steps themselves.

    It draws patches from its own generators, so that adapting does not change the course of training.

    Attributes:
        episodes (Episodes): Draws the patches.
        pairs (Pairs): The target's pairs ``(lq, gt)``.
        options (AdaptOptions): ``drtl.adapt``.
        seed (int): ``manual_seed``.
        criterion (Criterion): The loss.
        precision (Precision): Makes the context of a forward pass.
        inner_rates (InnerRates | None): Step sizes of the inner loop, for ``drtl.adapt.optimizer: inner``; None: Adam.
        stopped (Callable[[], bool]): Whether the run was told to stop, which ends an adaptation early.
        make_backward (Callable[[], Backward]): Makes the backward pass of an adaptation; a GAN's includes a
            discriminator.
        cross_validation (CrossValidation | None): What the last adaptation has chosen, with ``drtl.adapt.folds``.
        num_judges (int): How many folds choose the learning rate.
    """

    episodes: Episodes
    pairs: Pairs
    options: AdaptOptions
    seed: int
    criterion: Criterion
    precision: Precision
    inner_rates: InnerRates | None
    stopped: Callable[[], bool] = lambda: False
    make_backward: Callable[[], Backward] = lambda: _plain_backward
    cross_validation: CrossValidation | None = None
    num_judges: int = NUM_JUDGES

    def in_words(self) -> str:
        """Steps and pairs, for the report."""
        if self.cross_validation is not None:
            runs = num_runs(len(self.options.rates), len(self.cross_validation.folds), self.num_judges)
            return f'{runs} times {self.options.steps} steps on {len(self.pairs)} pairs'
        most = 'up to ' if self.options.early_stop else ''
        return f'{most}{self.options.steps} steps on {len(self.pairs)} pairs'

    def record(self) -> dict[str, Any]:
        """What the last adaptation did, for its checkpoint, in plain values."""
        record = {'pairs': len(self.pairs), 'steps': self.options.steps, 'lr': self.options.rates[0]}
        chosen = self.cross_validation
        if chosen is not None:
            record.update(lr=chosen.lr, folds=len(chosen.folds), share=chosen.share)
            record['held_out_loss'] = chosen.losses[chosen.share]
        return record

    def adapt(self, net: nn.Module, weights: Tensor) -> nn.Module:
        """Adapt a copy of a network to all pairs.

        Args:
            net (nn.Module): Trained network; not changed.
            weights (Tensor): ``(N,)``: replay draws tasks in proportion to them.

        Returns:
            nn.Module: The adapted copy in evaluation mode.
        """
        if self.options.folds:
            self.cross_validation = self._cross_validate(net, weights)
            return self.cross_validation.result
        steps = self._best_steps(net, weights) if self.options.early_stop else self.options.steps
        ticks = _ticks('adaptation', steps)
        course = self._until_stopped(self.course(net, weights, self.pairs, steps), ticks)
        with stage(f'Adapting to the target ({len(self.pairs)} pairs, {steps} steps)'):
            adapted = last(course)
            next(ticks, None)  # shows the last step
        return adapted

    def _cross_validate(self, net: nn.Module, weights: Tensor) -> CrossValidation:
        """Choose the learning rate, and how far to go, on pairs that were held out."""
        folds = folds_of([(lq.shape[-2], lq.shape[-1]) for lq, _ in self.pairs], self.options.folds)
        images = [[self._images(part) for part in fold] for fold in folds]
        judged_by = [self._judged_by(fold, seed) for seed, fold in enumerate(images)]
        total = num_runs(len(self.options.rates), len(folds), self.num_judges) * self.options.steps
        ticks = _ticks('adaptation', total)

        def adapted(fold: int, lr: float) -> nn.Module:
            others = [pair for other, parts in enumerate(images) if other != fold for pair in parts]
            course = self.course(net, weights, others, self.options.steps, lr, fold)
            return last(self._until_stopped(course, ticks))

        def loss(other: nn.Module, fold: int) -> float:
            lq, gt = judged_by[fold]
            with torch.no_grad(), self.precision():
                return self.criterion(other(lq), gt).item()

        with stage(f'Adapting to the target ({len(self.pairs)} pairs, {len(folds)} folds, {total} steps)'):
            result = cross_validate(net, folds, self.options.rates, adapted, loss, self.num_judges)
            next(ticks, None)
        get_root_logger().info(result.in_words())
        return result

    def _until_stopped(self, course: Iterator[nn.Module], ticks: Iterator[int]) -> Iterator[nn.Module]:
        """A course, each step of which is a tick of the progress."""
        yield next(course)  # before the first step
        for net in course:
            next(ticks)
            yield net
            if self.stopped():
                return

    def _images(self, part: Part) -> tuple[Tensor, Tensor]:
        """LQ and GT of a part of a pair."""
        lq, gt = self.pairs[part.pair]
        scale = gt.shape[-1] // lq.shape[-1]
        return lq[(..., *part.region(1))], gt[(..., *part.region(scale))]

    def _judged_by(self, fold: Pairs, seed: int) -> Batch:
        """Patches of a fold that networks are judged by, as large as the images allow."""
        unit = self.episodes.lq_size
        side = min(_LARGER * unit, *(extent for lq, _ in fold for extent in lq.shape[-2:])) // unit * unit or unit
        lq, gt = paired_patches(fold, _NUM_JUDGED, side, torch.Generator().manual_seed(seed))
        return self.episodes.on_network_device(lq, gt)

    def _best_steps(self, net: nn.Module, weights: Tensor) -> int:
        """The number of steps that restores a held-out fifth of the pairs best after adapting to the others."""
        most = self.options.steps
        generator = torch.Generator().manual_seed(self.seed)
        pairs = [self.pairs[i] for i in torch.randperm(len(self.pairs), generator=generator).tolist()]
        num_held_out = max(1, len(pairs) // 5)
        lq, gt = self.episodes.target_patches(_NUM_HELD_OUT, generator, pairs[:num_held_out])
        course = self.course(net, weights, pairs[num_held_out:], most)
        course = self._until_stopped(course, _ticks('finding the number of adaptation steps', most))
        with stage(f'Finding the number of adaptation steps ({num_held_out} of {len(pairs)} pairs held out)'):
            steps = best_step(course, lambda adapted: self.criterion(adapted(lq), gt).item(), most)
        get_root_logger().info(f'Held-out pairs are restored best after {steps} of {most} steps.')
        return steps

    def course(
        self, net: nn.Module, weights: Tensor, pairs: Pairs, steps: int, lr: float | None = None, fold: int = 0
    ) -> Iterator[nn.Module]:
        """The course of an adaptation to some of the pairs; see :func:`drtl_plugin.meta.adaptation.adaptation`."""
        return adaptation(
            net,
            self.criterion,
            self._batches(pairs, weights, steps, self.seed + fold),
            self.options.rates[0] if lr is None else lr,
            self.options.ema_decay,
            None if self.inner_rates is None else self.inner_rates.rates(),
            self.options.warmup,
            steps if self.options.schedule == 'linear' else 0,
            self.precision,
            self.make_backward(),
        )

    def _batches(self, pairs: Pairs, weights: Tensor, steps: int, seed: int) -> Iterator[Batch]:
        """A batch for each step: target patches, and replayed ones, augmented."""
        patches = torch.Generator().manual_seed(seed)
        distortions = torch.Generator(self.episodes.device).manual_seed(seed)
        size, share = self.options.batch_size, self.options.replay
        num_replayed = round(share * size)
        if 0 < share < 1:  # some of both
            num_replayed = min(max(num_replayed, 1), size - 1)
        for _ in range(steps):
            batch = []
            if num_replayed < size:
                batch.append(self.episodes.target_patches(size - num_replayed, patches, pairs))
            if num_replayed:
                batch.append(self.replayed_patches(num_replayed, weights, patches, distortions))
            # Pairs may be smaller than gt_size.
            lq_side, gt_side = (min(images[i].shape[-1] for images in batch) for i in range(2))
            joined = (
                torch.cat([lq[..., :lq_side, :lq_side] for lq, _ in batch]),
                torch.cat([gt[..., :gt_side, :gt_side] for _, gt in batch]),
            )
            if self.options.mixup:
                joined = mixed_up(joined, self.options.mixup, patches)
            if self.options.rgb_permutation:
                joined = with_channels_permuted(joined, self.options.rgb_permutation, patches)
            yield joined

    def replayed_patches(
        self, num: int, weights: Tensor, patches: torch.Generator, distortions: torch.Generator
    ) -> Batch:
        """Auxiliary patches ``(lq, gt)``, each under a task that is drawn by weight."""
        gt = self.episodes.auxiliary_gt(num, patches)
        drawn = torch.multinomial(weights, num, replacement=True, generator=patches).tolist()
        tasks = self.episodes.library.tasks
        lq = torch.cat([tasks[task](gt[i : i + 1], distortions) for i, task in enumerate(drawn)])
        return self.episodes.on_network_device(lq, gt)
