"""Skips steps whose loss or gradient is not finite."""

from __future__ import annotations

from typing import Any

import torch
from basicsr.utils import get_root_logger
from mmengine.registry import HOOKS

from drtl_plugin.errors import DRTLError, OptionError
from drtl_plugin.hooks.base import META_HOOK_REGISTRY, MetaTrainerHook, Runner
from drtl_plugin.runtime.distributed import any_process


class DivergedError(DRTLError):
    """Too many steps had a loss or gradient that is not finite."""


@HOOKS.register_module()
@META_HOOK_REGISTRY.register()
class NanGuardHook(MetaTrainerHook):
    """Skips steps whose loss or gradient is not finite, and ends the run if there are too many.

    Each skipped step is logged as a warning; from the first one on, the log has their number (``skipped_steps``).

    Args:
        max_skips (int): Number of steps that may be skipped in the whole run. Default: 20.

    Raises:
        OptionError: If ``max_skips`` is negative.
    """

    priority = 'VERY_HIGH'

    def __init__(self, max_skips: int = 20) -> None:
        if max_skips < 0:
            raise OptionError('NanGuardHook: max_skips must be at least 0.')
        self.max_skips = max_skips
        self._num_skips = 0

    def before_optimizer_step(self, runner: Runner, batch_idx: int, outputs: dict[str, Any] | None = None) -> None:
        """Check the losses and gradients of a step.

        Raises:
            DivergedError: If more than ``max_skips`` steps were skipped.
        """
        groups = (group for optimizer in runner.optimizers for group in optimizer.param_groups)
        gradients = [p.grad for group in groups for p in group['params'] if p.grad is not None]
        # One number for everything, so that this waits for a GPU only once.
        total = torch.stack(torch._foreach_norm(gradients)).sum() + sum(runner.losses_of_step.values())
        if any_process(not total.isfinite()):
            runner.skip_step = True
            self._num_skips += 1
            line = (
                f'iteration {batch_idx + 1}: the loss or the gradient is not finite (learning rate '
                f'{runner.get_current_learning_rate()[0]:.3g}; {_not_finite(runner)})'
            )
            if self._num_skips > self.max_skips:
                raise DivergedError(
                    f'{line}. {self._num_skips} steps were skipped, and max_skips of NanGuardHook is '
                    f'{self.max_skips}. Checkpoints are unchanged; lower train.optim_g.lr or drtl.inner.lr.'
                )
            get_root_logger().warning(f'{line}; the step is skipped, {self._num_skips} so far.')
        if self._num_skips:
            runner.log_dict['skipped_steps'] = self._num_skips

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Put the number of skipped steps into the training state."""
        checkpoint['num_skips'] = self._num_skips

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Continue the count."""
        self._num_skips = checkpoint.get('num_skips', 0)


@torch.no_grad()
def _not_finite(runner: Runner) -> str:
    """The tasks of the step whose loss is not finite, for a message."""
    batch, labels = runner.batch, runner.library.labels
    with runner.precision(), runner.uncompiled():
        losses = [runner.criterion(runner.net_g(lq), gt) for lq, gt in zip(batch.lq, batch.gt, strict=True)]
    found = dict.fromkeys(labels[task] for task, loss in zip(batch.tasks, losses, strict=True) if not loss.isfinite())
    if found:
        return f'tasks {", ".join(found)}'
    return f'somewhere in the step on {", ".join(dict.fromkeys(labels[task] for task in batch.tasks))}'
