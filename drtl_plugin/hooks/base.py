"""Meta-trainer hooks, which run around training steps, validation and saving; option files refer to them by name.

A hook is an ``mmengine.hooks.Hook``. Its runner is the model, of which it may use the members of :class:`Runner`. The
model calls these stages, hook by hook in order of priority:

======================== ==============================================================================
``before_train``         once, before the first step (or before adaptation, if there are no steps)
``before_train_iter``    before each step; the episodes are in ``runner.batch``
``before_optimizer_step`` with the gradients in place (not one of mmengine's stages)
``after_train_iter``     after each step
``before_val``           before a validation set is restored
``after_val``            after a validation set is restored
``before_save_checkpoint`` before networks and training state are saved
``after_load_checkpoint`` when a run is resumed
``after_train``          at the end of the run
======================== ==============================================================================

In a run of several processes, only the first one validates, saves and calls ``after_train``. Don't measure the relation
in these stages: that involves all processes. ``outputs`` and ``log_dict`` hold losses as tensors on the device.

Example of a hook of your own, in a module that ``basicsr train --import my_hooks`` imports::

    from drtl_plugin.hooks import META_HOOK_REGISTRY, MetaTrainerHook

    @META_HOOK_REGISTRY.register()
    class WeightLogHook(MetaTrainerHook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            runner.log_dict['max_weight'] = float(runner.weights.max())

and in the option file ``drtl: {hooks: [{type: WeightLogHook}]}``.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from basicsr.utils.registry import Registry
from mmengine.hooks import Hook
from mmengine.runner.priority import get_priority
from torch import Tensor, nn

from drtl_plugin.data.interface import EpisodeBatch, EpisodeDataset
from drtl_plugin.errors import OptionError, unknown
from drtl_plugin.meta.learner import Precision
from drtl_plugin.options.convert import number
from drtl_plugin.options.sections import DRTLOptions
from drtl_plugin.relation.estimators import RelationEvidence
from drtl_plugin.relation.graph import KnowledgeGraph
from drtl_plugin.report.pictures import ComparedCrop
from drtl_plugin.tasks.camera_fit import CameraFit
from drtl_plugin.tasks.library import DistortionLibrary

META_HOOK_REGISTRY = Registry('meta_hook')


class EpisodeSource(Protocol):
    """Draws patches for a hook. The draws depend only on the seed, the number of updates and the purpose."""

    def generators(self, purpose: str, num_update: int) -> tuple[torch.Generator, torch.Generator]:
        """New generators: one on the CPU, which draws patches, and one on the device, which draws distortions."""

    def auxiliary_pairs(
        self, num: int, patch_generator: torch.Generator, distortion_generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The same P = ``num`` patches under each of the N tasks: gt ``(P, 3, s h, s w)``, lq ``(N, P, 3, h, w)``."""

    def relation_evidence(self, num: int, num_update: int) -> RelationEvidence:
        """``num`` auxiliary and ``num`` target patches to measure the relation with."""


@runtime_checkable
class Runner(Protocol):
    """What a hook may use of the model; everything else is private.

    Attributes of the run:
        opt (dict): The parsed option file.
        drtl (DRTLOptions): Its ``drtl`` section.
        iter, max_iters (int): The current iteration, counted from 0, and the total number; mmengine's names.
        num_update (int): Steps so far, including those of a resumed run.
        stopping (bool): The run was told to stop, and should not start anything long.
        tb_logger: TensorBoard's ``SummaryWriter``, in the first process of a run that writes one; otherwise None.

    Attributes of the tasks:
        train_set (EpisodeDataset): The dataset of the episodes.
        library (DistortionLibrary): The N auxiliary tasks; with a camera fit, it is the last one.
        target_pairs (Sequence | None): The target's pairs ``(lq, gt)``; None if there is no target.
        camera_fit (CameraFit | None): The fitted camera.
        fit_share (float | None): Share of the total weight reserved for the camera fit; None without a fit.
        episodes (EpisodeSource): Draws patches.
        graph (KnowledgeGraph | None): The last measured graph. Hooks may set it, together with ``weights``.
        weights (Tensor): ``(N,)``: gradient weights of the tasks, mean 1.

    Attributes of the networks:
        net_g (nn.Module): The network that is trained.
        net_r (nn.Module | None): The DRN, if the relation needs one.
        net_r_is_trained (bool): Whether it is trained. Hooks may set it.
        net_g_adapted (nn.Module | None): The network adapted to the target, after the first adaptation.
        precision (Precision): Makes the context of a forward pass: autocast, or nothing.
        uncompiled (Callable): Makes a context in which ``net_g`` runs without being compiled, for varying image sizes.

    Attributes of the step:
        batch (EpisodeBatch): Its episodes.
        optimizers (list[torch.optim.Optimizer]): All of them; their parameters are what training changes.
        losses_of_step (Mapping[str, Tensor]): Losses by name, on the device.
        log_dict (dict): The values to log; hooks may add to it.
        skip_step (bool): Hooks may set it in ``before_optimizer_step``, to skip the optimisers' step.

    Attributes of the validation:
        validation_results (dict[str, dict[str, float]]): Last metrics, by dataset name with the pass's suffix.
        compared (dict[str, list[ComparedCrop]]): Crops of the first images, by the same names.
    """

    opt: dict[str, Any]
    drtl: DRTLOptions
    iter: int
    max_iters: int
    num_update: int
    stopping: bool
    tb_logger: Any

    train_set: EpisodeDataset
    library: DistortionLibrary
    target_pairs: Sequence[tuple[Tensor, Tensor]] | None
    camera_fit: CameraFit | None
    fit_share: float | None
    episodes: EpisodeSource
    graph: KnowledgeGraph | None
    weights: Tensor

    net_g: nn.Module
    net_r: nn.Module | None
    net_r_is_trained: bool
    net_g_adapted: nn.Module | None
    precision: Precision
    uncompiled: Callable[[], AbstractContextManager[Any]]

    batch: EpisodeBatch
    optimizers: list[torch.optim.Optimizer]
    losses_of_step: Mapping[str, Tensor]
    log_dict: dict[str, Any]
    skip_step: bool

    validation_results: dict[str, dict[str, float]]
    compared: dict[str, list[ComparedCrop]]

    def criterion(self, output: Tensor, gt: Tensor) -> Tensor:
        """The loss without the GAN loss: a scalar, for ``output`` and ``gt`` of ``(B, 3, H, W)``."""

    def adapt_to_target(self) -> None:
        """Adapt a copy of the network to the target's pairs; it becomes ``net_g_adapted``."""

    def save_network(self, net: nn.Module, net_label: str, current_iter: int) -> None:
        """Write ``models/LABEL_ITERATION.pth``."""

    def get_current_learning_rate(self) -> list[float]:
        """Learning rates of the parameter groups of the first optimiser."""


class MetaTrainerHook(Hook):
    """Base class of the meta-trainer hooks.

    A hook that has state puts it into ``checkpoint`` in ``before_save_checkpoint`` (tensors and plain values, under a
    key of its own), and takes it out in ``after_load_checkpoint``.
    """

    def before_optimizer_step(self, runner: Runner, batch_idx: int, outputs: dict[str, Any] | None = None) -> None:
        """Called with the gradients in place; ``runner.skip_step = True`` skips the optimisers' step."""


DEFAULT_HOOKS = ('NanGuardHook', 'RelationHook', 'FewShotAdaptHook', 'GraphRecordHook')


def build_hooks(hook_opts: list[dict[str, Any]]) -> list[Hook]:
    """Build the hooks of an option file.

    Args:
        hook_opts (list[dict]): ``{type: name, **arguments}``. Those in ``DEFAULT_HOOKS`` are always built; an entry of
            such a type, or of a class derived from it, replaces it. Others are added, as often as they are listed.

    Returns:
        list[Hook]: In order of priority.

    Raises:
        OptionError: Unknown hook or argument, or two entries that replace the same default hook.
    """
    defaults = {META_HOOK_REGISTRY.get(name): name for name in DEFAULT_HOOKS}
    placed: dict[type, Hook] = {}
    added: list[Hook] = []
    for i, hook_opt in enumerate(hook_opts):
        where = f'drtl.hooks[{i}]'
        hook = _build_hook(hook_opt, where)
        default = next((cls for cls in defaults if isinstance(hook, cls)), None)
        if default is None:
            added.append(hook)
        elif default in placed:
            # They would share a key of the training state, and both change the model.
            raise OptionError(
                f'{where}: there can be only one {defaults[default]}; write its arguments into one entry.'
            )
        else:
            placed[default] = hook
    hooks = [placed[cls] if cls in placed else cls() for cls in defaults]
    return sorted([*hooks, *added], key=lambda hook: get_priority(hook.priority))


def _build_hook(hook_opt: dict[str, Any], where: str) -> Hook:
    """Build the hook of one entry, with its arguments checked against the constructor."""
    arguments = dict(hook_opt)
    name = arguments.pop('type', None)
    if name not in META_HOOK_REGISTRY:
        raise unknown('meta-trainer hook', name, META_HOOK_REGISTRY.keys(), f'{where} (--import loads your own)')
    hook = META_HOOK_REGISTRY.get(name)
    known = inspect.signature(hook).parameters
    try:
        hints = typing.get_type_hints(hook.__init__)
    except NameError:  # an annotation that only type checkers import
        hints = {}
    for key, value in arguments.items():
        if key not in known:
            raise unknown(f'argument of {name}', key, known, where)
        if hints.get(key) in (int, float):
            arguments[key] = number(value, hints[key], f'{where}.{key}')
    return hook(**arguments)


def call_hooks(hooks: Sequence[Hook], stage: str, runner: Runner, **arguments: Any) -> None:
    """Call a stage of all hooks in order.

    Args:
        hooks (Sequence[Hook]): From :func:`build_hooks`.
        stage (str): Name of the method.
        runner (Runner): Its first argument.
        **arguments: The other arguments, which depend on the stage.
    """
    for hook in hooks:
        # Plain mmengine hooks lack before_optimizer_step.
        method = getattr(hook, stage, None)
        if method is not None:
            method(runner, **arguments)
