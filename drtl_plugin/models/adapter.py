"""Adapts a network to the target's pairs, with the settings in ``drtl.adapt``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from drtl_plugin.meta.adaptation import Backward, adaptation, best_step, last
from drtl_plugin.meta.learner import Batch, Criterion, Precision, Rates
from drtl_plugin.models.episode_synthesis import Episodes
from drtl_plugin.options.sections import AdaptOptions
from drtl_plugin.runtime.progress import progress, stage

# Patches of the held-out pairs that early stopping judges by.
_NUM_HELD_OUT = 32

Pairs = Sequence[tuple[Tensor, Tensor]]
# Called with the number of steps and the adapted network, which it must not change.
Watch = Callable[[int, nn.Module], None]


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
        rates (Rates | None): Step sizes of the inner loop, for ``drtl.adapt.optimizer: inner``; None: Adam.
        stopped (Callable[[], bool]): Whether the run was told to stop, which ends an adaptation early.
        make_backward (Callable[[], Backward]): Makes the backward pass of an adaptation; a GAN's includes a
            discriminator.
    """

    episodes: Episodes
    pairs: Pairs
    options: AdaptOptions
    seed: int
    criterion: Criterion
    precision: Precision
    rates: Rates | None
    stopped: Callable[[], bool] = lambda: False
    make_backward: Callable[[], Backward] = lambda: _plain_backward

    def in_words(self) -> str:
        """Steps and pairs, for the report."""
        most = 'up to ' if self.options.early_stop else ''
        return f'{most}{self.options.steps} steps on {len(self.pairs)} pairs'

    def adapt(self, net: nn.Module, weights: Tensor, watch: Watch | None = None) -> nn.Module:
        """Adapt a copy of a network to all pairs.

        Args:
            net (nn.Module): Trained network; not changed.
            weights (Tensor): ``(N,)``: replay draws tasks in proportion to them.
            watch (Watch | None): Called before the first step and after each.

        Returns:
            nn.Module: The adapted copy in evaluation mode.
        """
        steps = self._best_steps(net, weights) if self.options.early_stop else self.options.steps
        course = self._shown(self.course(net, weights, self.pairs, steps), 'adaptation', steps)
        with stage(f'Adapting to the target ({len(self.pairs)} pairs, {steps} steps)'):
            return last(course if watch is None else _watched(course, watch))

    def _best_steps(self, net: nn.Module, weights: Tensor) -> int:
        """The number of steps that restores a held-out fifth of the pairs best after adapting to the others."""
        most = self.options.steps
        generator = torch.Generator().manual_seed(self.seed)
        pairs = [self.pairs[i] for i in torch.randperm(len(self.pairs), generator=generator).tolist()]
        num_held_out = max(1, len(pairs) // 5)
        lq, gt = self.episodes.target_patches(_NUM_HELD_OUT, generator, pairs[:num_held_out])
        course = self.course(net, weights, pairs[num_held_out:], most)
        course = self._shown(course, 'finding the number of adaptation steps', most)
        with stage(f'Finding the number of adaptation steps ({num_held_out} of {len(pairs)} pairs held out)'):
            steps = best_step(course, lambda adapted: self.criterion(adapted(lq), gt).item(), most)
        get_root_logger().info(f'Held-out pairs are restored best after {steps} of {most} steps.')
        return steps

    def _shown(self, course: Iterator[nn.Module], name: str, steps: int) -> Iterator[nn.Module]:
        """A course with its progress shown."""
        yield next(course)  # before the first step
        for net in progress(course, name, steps):
            yield net
            if self.stopped():
                return

    def course(self, net: nn.Module, weights: Tensor, pairs: Pairs, steps: int) -> Iterator[nn.Module]:
        """The course of an adaptation to some of the pairs; see :func:`drtl_plugin.meta.adaptation.adaptation`."""
        return adaptation(
            net,
            self.criterion,
            self._batches(pairs, weights, steps),
            self.options.lr,
            self.options.ema_decay,
            self.rates,
            self.options.warmup,
            self.precision,
            self.make_backward(),
        )

    def _batches(self, pairs: Pairs, weights: Tensor, steps: int) -> Iterator[Batch]:
        """A batch for each step: target patches, and replayed ones."""
        patches = torch.Generator().manual_seed(self.seed)
        distortions = torch.Generator(self.episodes.device).manual_seed(self.seed)
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
            yield (
                torch.cat([lq[..., :lq_side, :lq_side] for lq, _ in batch]),
                torch.cat([gt[..., :gt_side, :gt_side] for _, gt in batch]),
            )

    def replayed_patches(
        self, num: int, weights: Tensor, patches: torch.Generator, distortions: torch.Generator
    ) -> Batch:
        """Auxiliary patches ``(lq, gt)``, each under a task that is drawn by weight."""
        gt = self.episodes.auxiliary_gt(num, patches)
        drawn = torch.multinomial(weights, num, replacement=True, generator=patches).tolist()
        tasks = self.episodes.library.tasks
        lq = torch.cat([tasks[task](gt[i : i + 1], distortions) for i, task in enumerate(drawn)])
        return self.episodes.on_network_device(lq, gt)


def _watched(course: Iterator[nn.Module], watch: Watch) -> Iterator[nn.Module]:
    for step, net in enumerate(course):
        watch(step, net)
        yield net
