"""Measures the relation of the auxiliary tasks to the target, and sets the gradient weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import master_only
from mmengine.hooks.hook import DATA_BATCH
from mmengine.registry import HOOKS
from torch import nn

from drtl_plugin.errors import OptionError, unknown
from drtl_plugin.hooks.base import META_HOOK_REGISTRY, MetaTrainerHook, Runner
from drtl_plugin.relation.drn_training import train_drn
from drtl_plugin.relation.estimators import (
    ESTIMATOR_REGISTRY,
    RelationEstimator,
    RelationQuestion,
    needs_trained_network,
)
from drtl_plugin.relation.graph import KnowledgeGraph, NonFiniteRelationError
from drtl_plugin.relation.weights import relation_weights, reserve_share
from drtl_plugin.runtime.distributed import of_first_process
from drtl_plugin.runtime.progress import progress, stage


def find_estimator(name: str) -> RelationEstimator:
    """The estimator that ``drtl.weighting.relation`` names.

    Raises:
        OptionError: If there is none.
    """
    if name not in ESTIMATOR_REGISTRY:
        raise unknown('estimator', name, ESTIMATOR_REGISTRY.keys(), 'drtl.weighting.relation')
    return ESTIMATOR_REGISTRY.get(name)


def set_graph(runner: Runner, graph: KnowledgeGraph) -> None:
    """Set the runner's graph, and the weights that ``drtl.weighting`` derives from it."""
    options = runner.drtl.weighting
    weights = relation_weights(graph.relation, options.effective_tasks, options.temperature, options.floor)
    runner.graph, runner.weights = graph, reserve_share(weights, runner.fit_share)


@HOOKS.register_module()
@META_HOOK_REGISTRY.register()
class RelationHook(MetaTrainerHook):
    """Measures the knowledge graph before training and every ``interval`` iterations, and sets the gradient weights.

    For the relation ``embedding``, it trains the DRN first and saves it as ``models/net_r_0.pth``, unless
    ``path.pretrain_network_r`` names a trained one. ``gradient`` and ``transfer`` are measured before training only if
    ``path.pretrain_network_g`` names a trained network. A relation that is not finite before training ends the run;
    during training, it is logged as a warning, and the weights stay as they are.

    Args:
        interval (int): Iterations between two measurements; each costs about as much as 260 training steps.
            Default: 10000.
        drn_steps (int): Training steps of the DRN. Default: 300.
        drn_lr (float): Its initial learning rate. Default: 2e-3.
        drn_patches (int): GT patches per step; each is seen under every task. Default: 16.
        drn_contents (int): GT patches that all steps draw from. Default: 256.
        num_patches (int): GT patches to measure with, for each task and for the target. Default: 64.
        transfer_steps (int): Adam steps on each task (``transfer`` only). Default: 20.
        transfer_lr (float): Learning rate of these steps. Default: 1e-4.

    Raises:
        OptionError: If an argument is out of range.
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

    def before_train(self, runner: Runner) -> None:
        """Train the DRN unless it is trained, and measure the graph unless one was resumed."""
        if runner.target_pairs is None:
            get_root_logger().info('There is no datasets.train.target: all auxiliary tasks have equal weights.')
            return
        if runner.net_r is not None and not runner.net_r_is_trained:
            self._train_drn(runner, runner.net_r)
        relation = runner.drtl.weighting.relation
        if runner.graph is not None:
            return
        # A resumed run has pretrain_network_g, too; if its state has no graph, it was still waiting for the interval.
        untrained = runner.num_update > 0 or runner.opt['path'].get('pretrain_network_g') is None
        if needs_trained_network(relation) and untrained:
            get_root_logger().info(
                f'Relation {relation!r} needs a trained network, but this one is untrained: all tasks have equal '
                f'weights until iteration {self.interval}.'
            )
            return
        self.measure(runner)

    @master_only
    def _train_drn(self, runner: Runner, net_r: nn.Module) -> None:
        with stage(f'Training the DRN ({len(runner.library)} auxiliary tasks, {self.drn_steps} steps)'):
            patch_generator, distortion_generator = runner.episodes.generators('DRN training', runner.num_update)
            gt, lq = runner.episodes.auxiliary_pairs(self.drn_contents, patch_generator, distortion_generator)
            losses = train_drn(net_r, gt, lq, self.drn_steps, self.drn_lr, self.drn_patches, patch_generator)
            *_, last = progress(losses, 'DRN', self.drn_steps)
        get_root_logger().info(f'The DRN is trained; last loss {last:.3f}.')
        runner.net_r_is_trained = True
        runner.save_network(net_r, 'net_r', 0)

    def measure(self, runner: Runner) -> None:
        """Measure the graph, and set the runner's graph and weights.

        Raises:
            NonFiniteRelationError: If a relation is NaN or infinite; graph and weights stay as they are.
        """
        relation = runner.drtl.weighting.relation
        estimate = find_estimator(relation)
        question = RelationQuestion(
            runner.library.labels,
            lambda: runner.episodes.relation_evidence(self.num_patches, runner.num_update),
            runner.net_r,
            runner.net_g,
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
            set_graph(runner, graph)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: DATA_BATCH = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Measure the graph again every ``interval`` iterations."""
        if runner.target_pairs is not None and self.every_n_train_iters(runner, self.interval):
            try:
                self.measure(runner)
            except NonFiniteRelationError as error:
                get_root_logger().warning(f'iteration {batch_idx + 1}: {error} The weights stay as they are.')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Put the graph's labels and edges into the training state."""
        if runner.graph is not None:
            checkpoint['knowledge_graph'] = {'labels': list(runner.graph.labels), 'edges': runner.graph.edges}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Take the graph from the training state.

        Raises:
            OptionError: If the graph is of other tasks.
        """
        if 'knowledge_graph' in checkpoint:
            graph = checkpoint['knowledge_graph']
            if graph['labels'] != runner.library.labels:
                raise OptionError(
                    'datasets.train.distortions: these are not the tasks of the run to resume; '
                    'restore them, or start a new run.'
                )
            set_graph(runner, KnowledgeGraph(tuple(graph['labels']), graph['edges'].cpu()))
