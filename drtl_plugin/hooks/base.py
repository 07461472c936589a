"""Meta-trainer hooks: what happens around the training steps, named in the option file and found by registry.

A hook is an ``mmengine.hooks.Hook``; its ``runner`` is the :class:`drtl_plugin.models.drtl_model.DRTLModel`. The
model calls ``before_train``, ``before_train_iter``, ``before_optimizer_step``, ``after_train_iter``, ``before_val``,
``after_val``, ``before_save_checkpoint``, ``after_load_checkpoint`` and ``after_train``, in the order of the hooks'
priorities. Where several processes train, validation, saving and ``after_train`` are the first one's alone; a stage of
those must not measure the relation, which all of them take part in. ``outputs`` and ``log_dict`` hold losses as tensors
on the device.

Example of a hook of one's own, in a module that ``basicsr train --import my_hooks`` imports::

    from drtl_plugin.meta import META_HOOK_REGISTRY, MetaTrainerHook

    @META_HOOK_REGISTRY.register()
    class WeightLogHook(MetaTrainerHook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            runner.log_dict['max_weight'] = float(runner.weights.max())

and in the option file ``drtl: {hooks: [{type: WeightLogHook}]}``.
"""

from __future__ import annotations

import csv
import gc
import inspect
import typing
from contextlib import nullcontext
from pathlib import Path

import torch
from basicsr.utils import get_root_logger, imfrombytes
from basicsr.utils.dist_util import master_only
from basicsr.utils.registry import Registry
from mmengine.hooks import Hook
from mmengine.hooks.hook import DATA_BATCH
from mmengine.registry import HOOKS
from mmengine.runner.priority import get_priority

from drtl_plugin.errors import DRTLError, OptionError, unknown
from drtl_plugin.options.parse import number
from drtl_plugin.relation.drn_training import train_drn
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY, RelationQuestion, needs_trained_network
from drtl_plugin.relation.graph import KnowledgeGraph, NonFiniteRelationError
from drtl_plugin.report.pictures import draw_camera_fit, draw_graph
from drtl_plugin.report.tables import relation_table, write_graph
from drtl_plugin.runtime import checkpoints
from drtl_plugin.runtime.distributed import any_process, of_first_process
from drtl_plugin.runtime.progress import aside, progress, stage

META_HOOK_REGISTRY = Registry('meta_hook')


class DivergedError(DRTLError):
    """Training has left the finite numbers."""


class MetaTrainerHook(Hook):
    """Base class of the meta-trainer hooks. A hook's state goes through the training state:

    ``before_save_checkpoint`` puts it into ``checkpoint`` (tensors and plain values, under a key of its own),
    ``after_load_checkpoint`` takes it out.
    """

    def before_optimizer_step(self, runner, batch_idx: int, outputs: dict | None = None) -> None:
        """Called with the gradients of a step in place; setting ``runner.skip_step`` leaves the step out.

        Not one of mmengine's stages.
        """


@HOOKS.register_module()
@META_HOOK_REGISTRY.register()
class RelationHook(MetaTrainerHook):
    """Keeps the model's knowledge graph and gradient weights.

    For the relation ``embedding`` it first trains the DRN, unless ``path.pretrain_network_r`` names one, and keeps it
    as ``models/net_r_0.pth``. It measures the graph before training (``gradient`` and ``transfer`` only where
    ``path.pretrain_network_g`` names a network that has learned something) and every ``interval`` iterations. A
    relation that is not finite ends the run before training; during training, it is warned of and the weights stay.

    Args:
        interval (int): Iterations between two measurements, each as dear as some hundred. Default: 10000.
        drn_steps (int): Training steps of the DRN. Default: 300.
        drn_lr (float): Its initial learning rate. Default: 2e-3.
        drn_patches (int): Contents a step; each is seen under every task. Default: 16.
        drn_contents (int): Contents that are drawn from for all steps. Default: 256.
        num_patches (int): Contents to measure with, a task; and patches of the target. Default: 64.
        transfer_steps (int): Adam steps on each task (``transfer`` only). Default: 20.
        transfer_lr (float): Their size. Default: 1e-4.
    """

    priority = 'HIGH'

    def __init__(
        self,
        interval: int = 10000,
        drn_steps: int = 300,
        drn_lr: float = 2e-3,
        drn_patches: int = 16,
        drn_contents: int = 256,
        num_patches: int = 64,
        transfer_steps: int = 20,
        transfer_lr: float = 1e-4,
    ) -> None:
        if min(interval, drn_steps, drn_contents, transfer_steps, drn_lr, transfer_lr) <= 0:
            raise OptionError('RelationHook: interval, steps, contents and learning rates must be above 0.')
        if min(drn_patches, num_patches) < 2:
            raise OptionError('RelationHook: drn_patches and num_patches must be at least 2.')
        self.interval = interval
        self.drn_steps = drn_steps
        self.drn_lr = drn_lr
        self.drn_patches = drn_patches
        self.drn_contents = drn_contents
        self.num_patches = num_patches
        self.transfer_steps = transfer_steps
        self.transfer_lr = transfer_lr

    def before_train(self, runner) -> None:
        """Train the DRN where there is none yet, and measure the graph where none was resumed."""
        if runner.target_pairs is None:
            get_root_logger().info('There is no datasets.train.target: all auxiliary tasks weigh alike.')
            return
        if runner.net_r is not None and not runner.net_r_is_trained:
            self._train_drn(runner)
        relation = runner.drtl.weighting.relation
        if runner.graph is not None:
            return
        # A resumed run has a path here, too; without a graph in its state it was still waiting.
        untrained = runner.num_update > 0 or runner.opt['path'].get('pretrain_network_g') is None
        if needs_trained_network(relation) and untrained:
            get_root_logger().info(
                f'Relation {relation!r} asks the network, which has learned nothing yet: all tasks weigh alike until '
                f'iteration {self.interval}.'
            )
            return
        self.measure(runner)

    @master_only
    def _train_drn(self, runner) -> None:
        with stage(f'Training the DRN ({len(runner.library)} auxiliary tasks, {self.drn_steps} steps)'):
            patch_generator, distortion_generator = runner.generators('DRN training')
            gt, lq = runner.auxiliary_pairs(self.drn_contents, patch_generator, distortion_generator)
            losses = train_drn(runner.net_r, gt, lq, self.drn_steps, self.drn_lr, self.drn_patches, patch_generator)
            *_, last = progress(losses, 'DRN', self.drn_steps)
        get_root_logger().info(f'The DRN is trained; last loss {last:.3f}.')
        runner.net_r_is_trained = True
        runner.save_network(runner.net_r, 'net_r', 0)

    def measure(self, runner) -> None:
        """Measure the graph, and set the model's graph and weights.

        Raises:
            NonFiniteRelationError: If a relation is NaN or infinite; graph and weights stay as they are.
        """
        relation = runner.drtl.weighting.relation
        estimate = ESTIMATOR_REGISTRY.get(relation)
        question = RelationQuestion(
            runner.library.labels,
            lambda: runner.relation_evidence(self.num_patches),
            runner.net_r,
            runner.get_bare_model(runner.net_g),
            runner.criterion,
            self.transfer_steps,
            self.transfer_lr,
            runner.precision,
        )
        with nullcontext() if relation == 'uniform' else stage(f'Measuring the relation to the target ({relation})'):
            try:
                graph = of_first_process(lambda: estimate(question))
            except NonFiniteRelationError as error:
                raise NonFiniteRelationError(
                    f'drtl.weighting.relation: {error} Check these tasks in datasets.train.distortions and the pairs '
                    'of datasets.train.target, or choose another relation.'
                ) from None
            runner.set_graph(graph)

    def after_train_iter(self, runner, batch_idx: int, data_batch: DATA_BATCH = None, outputs=None) -> None:
        """Measure the graph anew every ``interval`` iterations; where it is not finite, the weights stay."""
        if runner.target_pairs is not None and self.every_n_train_iters(runner, self.interval):
            try:
                self.measure(runner)
            except NonFiniteRelationError as error:
                get_root_logger().warning(f'iteration {batch_idx + 1}: {error} The weights stay as they are.')

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Put the graph's labels and edges into the training state."""
        if runner.graph is not None:
            checkpoint['knowledge_graph'] = {'labels': list(runner.graph.labels), 'edges': runner.graph.edges}

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Take the graph from the training state."""
        if 'knowledge_graph' in checkpoint:
            graph = checkpoint['knowledge_graph']
            if graph['labels'] != runner.library.labels:
                raise OptionError(
                    'datasets.train.distortions: these are not the tasks that the run to resume has learned; '
                    'restore them, or start a new run.'
                )
            runner.set_graph(KnowledgeGraph(tuple(graph['labels']), graph['edges'].cpu()))


@HOOKS.register_module()
@META_HOOK_REGISTRY.register()
class GraphRecordHook(MetaTrainerHook):
    """Writes the knowledge graph, the weights and the metrics where people look, whenever they were measured anew.

    ``knowledge_graph.json`` and ``knowledge_graph.png`` in the experiment's folder; relation, weights, the picture and
    crops of the validated images in TensorBoard; all measurements in ``weights.csv``; the first one as a table in the
    log. All validations in ``metrics.csv``, each with the number of optimiser steps before it. Where the camera was
    fitted, ``camera_fit.pth`` (for ``path.pretrain_camera_fit``) and ``camera_fit.png``, its kernels, before training.
    """

    priority = 'LOW'

    def __init__(self) -> None:
        self._recorded: KnowledgeGraph | None = None
        self._rows: list[list] = []
        self._metrics: dict[tuple[int, str, str], float] = {}
        self._written: dict[str, dict[str, float]] = {}

    @master_only
    def before_train(self, runner) -> None:
        """Record the camera fit, and warn where it should not be trusted."""
        fit = runner.camera_fit
        if fit is None:
            return
        folder = Path(runner.opt['path']['experiments_root'])
        checkpoints.save(fit.state(), folder / 'camera_fit.pth')
        draw_camera_fit(fit, folder / 'camera_fit.png')
        logger = get_root_logger()
        logger.info(f'Camera fit: {fit.summary()}.')
        for reason in fit.warnings():
            logger.warning(f'Do not trust the camera fit: {reason}.')

    def before_train_iter(self, runner, batch_idx: int, data_batch: DATA_BATCH = None) -> None:
        """Record a graph that is new since the last iteration."""
        self._record(runner, batch_idx)

    @master_only
    def after_val(self, runner) -> None:
        """Record the metrics; a validation that resuming repeats takes the place of the first one."""
        from drtl_plugin.report.tables import BICUBIC, comparison_picture  # models import hooks

        for dataset, metrics in runner.validation_results.items():
            if self._written.get(dataset) is metrics:  # of an earlier validation
                continue
            self._written[dataset] = metrics
            iteration = 0 if dataset.endswith(BICUBIC) else runner.num_update
            for name, value in metrics.items():
                self._metrics[iteration, dataset, name] = float(value)
        path = Path(runner.opt['path']['experiments_root'], 'metrics.csv')
        with open(path, 'w', newline='', encoding='utf-8') as file:
            rows = ([*key, value] for key, value in self._metrics.items())
            csv.writer(file).writerows([['iteration', 'dataset', 'metric', 'value'], *rows])
        if runner.tb_logger is None:
            return
        for dataset in (name[: -len(BICUBIC)] for name in runner.compared if name.endswith(BICUBIC)):
            picture = comparison_picture(runner.compared, dataset)
            if picture is not None:
                rgb = picture[:, :, ::-1].copy()
                runner.tb_logger.add_image(f'comparison/{dataset}', rgb, runner.num_update, dataformats='HWC')

    def after_train(self, runner) -> None:
        """Record the last graph."""
        self._record(runner, runner.iter + 1)

    @master_only
    @aside()
    def _record(self, runner, iteration: int) -> None:
        graph, weights = runner.graph, runner.weights
        if graph is None or graph is self._recorded:
            return
        if self._recorded is None:
            get_root_logger().info(f'Relation to the target and gradient weight:\n{relation_table(graph, weights)}')
        self._recorded = graph
        folder = Path(runner.opt['path']['experiments_root'])
        for row in zip(graph.labels, graph.relation.tolist(), weights.tolist()):
            self._rows.append([iteration, *row])
        with open(folder / 'weights.csv', 'w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows([['iteration', 'task', 'relation', 'weight'], *self._rows])
        write_graph(graph, folder / 'knowledge_graph.json', weights)
        draw_graph(graph, folder / 'knowledge_graph.png', weights, runner.fit_share)
        # Figures are circles of references, of megabytes each, and a training loop makes too few objects for Python to
        # go and look for them.
        gc.collect()
        writer = runner.tb_logger
        if writer is None:
            return
        for label, relation, weight in zip(graph.labels, graph.relation.tolist(), weights.tolist()):
            tag = label.replace(' ', '_')
            writer.add_scalar(f'relation/{tag}', relation, iteration)
            writer.add_scalar(f'weights/{tag}', weight, iteration)
        picture = imfrombytes((folder / 'knowledge_graph.png').read_bytes())[:, :, ::-1].copy()
        writer.add_image('knowledge_graph', picture, iteration, dataformats='HWC')

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Put what was recorded into the training state."""
        metrics = [[*key, value] for key, value in self._metrics.items()]
        is_latest = self._recorded is runner.graph
        checkpoint['graph_record'] = {'rows': self._rows, 'is_latest': is_latest, 'metrics': metrics}

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Go on with the record; a graph that is in it is not recorded again."""
        if 'graph_record' in checkpoint:
            self._rows = list(checkpoint['graph_record']['rows'])
            self._metrics = {tuple(key): value for *key, value in checkpoint['graph_record'].get('metrics', [])}
            if checkpoint['graph_record']['is_latest']:
                self._recorded = runner.graph


@HOOKS.register_module()
@META_HOOK_REGISTRY.register()
class FewShotAdaptHook(MetaTrainerHook):
    """Adapts the network to the target's support set whenever it is validated or saved.

    Options: ``drtl.adapt``. The adapted network is evaluated beside the unadapted one and saved as
    ``net_g_adapted``.
    """

    def __init__(self) -> None:
        self._adapted_at = -1

    def _adapt(self, runner) -> None:
        if runner.target_pairs is not None and self._adapted_at != runner.num_update:
            runner.adapt_to_target()
            self._adapted_at = runner.num_update

    def before_val(self, runner) -> None:
        """Adapt, unless the network has not changed since the last time."""
        self._adapt(runner)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Adapt, unless the network has not changed since the last time, or the run ends in a hurry."""
        if not runner.stopping:
            self._adapt(runner)


@HOOKS.register_module()
@META_HOOK_REGISTRY.register()
class NanGuardHook(MetaTrainerHook):
    """Leaves out the steps whose loss or gradient is not finite, and ends the run when there are too many.

    The log has their number (``skipped_steps``) as soon as there are any, and a line for each.

    Args:
        max_skips (int): Steps, of the whole run, that may be left out. Default: 20.
    """

    priority = 'VERY_HIGH'

    def __init__(self, max_skips: int = 20) -> None:
        if max_skips < 0:
            raise OptionError('NanGuardHook: max_skips must be at least 0.')
        self.max_skips = max_skips
        self._num_skips = 0

    def before_optimizer_step(self, runner, batch_idx: int, outputs: dict | None = None) -> None:
        """Look at the losses and gradients of a step.

        Raises:
            DivergedError: If more than ``max_skips`` steps had to be left out.
        """
        gradients = [p.grad for p in runner.trained_parameters() if p.grad is not None]
        # One number for all of them, so that a GPU is waited for once.
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
                    f'{line}. {self._num_skips} steps were left out, and max_skips of NanGuardHook is '
                    f'{self.max_skips}. Checkpoints are as they were; lower train.optim_g.lr or drtl.inner.lr.'
                )
            get_root_logger().warning(f'{line}; the step is left out, the {self._num_skips}. of this run.')
        if self._num_skips:
            outputs['skipped_steps'] = self._num_skips

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Put the number of steps that were left out into the training state."""
        checkpoint['num_skips'] = self._num_skips

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Go on counting."""
        self._num_skips = checkpoint.get('num_skips', 0)


@torch.no_grad()
def _not_finite(runner) -> str:
    """Which tasks of the step have a loss that is not finite, for a message."""
    with runner.precision(), runner.uncompiled():
        losses = [runner.criterion(runner.net_g(lq), gt) for lq, gt in zip(runner.episode_lq, runner.episode_gt)]
    labels = runner.library.labels
    step = dict.fromkeys(labels[task] for task in runner.episode_tasks)
    found = dict.fromkeys(labels[task] for task, loss in zip(runner.episode_tasks, losses) if not loss.isfinite())
    return f'tasks {", ".join(found)}' if found else f'somewhere in the step on {", ".join(step)}'


DEFAULT_HOOKS = ('NanGuardHook', 'RelationHook', 'FewShotAdaptHook', 'GraphRecordHook')


def build_hooks(hook_opts: list[dict]) -> list[Hook]:
    """Build the hooks of an option file.

    Args:
        hook_opts (list[dict]): ``{type: name, **arguments}``. Those in ``DEFAULT_HOOKS`` are there anyway; an entry
            of their type sets their arguments. Others are added, as often as they are written.

    Returns:
        list[Hook]: In order of priority.

    Raises:
        OptionError: Unknown hook or argument, or two entries of a type in ``DEFAULT_HOOKS``.
    """
    defaults: dict[str, dict] = {name: {} for name in DEFAULT_HOOKS}
    added = []
    for i, hook_opt in enumerate(hook_opts):
        where = f'drtl.hooks[{i}]'
        arguments = dict(hook_opt)
        name = arguments.pop('type', None)
        if name not in META_HOOK_REGISTRY:
            raise unknown(
                'meta-trainer hook', name, META_HOOK_REGISTRY.keys(), f'{where} (--import brings in your own)'
            )
        hook = META_HOOK_REGISTRY.get(name)
        known = inspect.signature(hook).parameters
        try:
            hints = typing.get_type_hints(hook.__init__)
        except NameError:  # of a class that is imported for type checkers only
            hints = {}
        for key, value in arguments.items():
            if key not in known:
                raise unknown(f'argument of {name}', key, known, where)
            if hints.get(key) in (int, float):
                arguments[key] = number(value, hints[key], f'{where}.{key}')
        if name not in defaults:
            added.append((name, arguments))
        elif name in (other.get('type') for other in hook_opts[:i]):
            # They share their key of the training state, and what they do to the model.
            raise OptionError(f'{where}: there can be only one {name}; write its arguments into one entry.')
        else:
            defaults[name] = arguments
    hooks = [META_HOOK_REGISTRY.get(name)(**arguments) for name, arguments in [*defaults.items(), *added]]
    return sorted(hooks, key=lambda hook: get_priority(hook.priority))
