"""Adapts the network to the target before it is validated or saved."""

from __future__ import annotations

from typing import Any

from mmengine.registry import HOOKS

from drtl_plugin.hooks.base import META_HOOK_REGISTRY, MetaTrainerHook, Runner


@HOOKS.register_module()
@META_HOOK_REGISTRY.register()
class FewShotAdaptHook(MetaTrainerHook):
    """Adapts the network to the target's pairs before it is validated or saved; ``drtl.adapt`` has the settings.

    The adapted network is validated alongside the unadapted one, and saved as ``net_g_adapted``.
    """

    def __init__(self) -> None:
        self._adapted_at = -1

    def _adapt(self, runner: Runner) -> None:
        if runner.target_pairs is not None and self._adapted_at != runner.num_update:
            runner.adapt_to_target()
            self._adapted_at = runner.num_update

    def before_val(self, runner: Runner) -> None:
        """Adapt, unless there were no training steps since the last time."""
        self._adapt(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Adapt, unless there were no training steps since the last time, or the run was told to stop."""
        if not runner.stopping:
            self._adapt(runner)
