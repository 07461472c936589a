"""Writes the camera fit, the knowledge graph, the weights and the metrics to files and TensorBoard."""

from __future__ import annotations

import csv
import gc
from pathlib import Path
from typing import Any

from basicsr.utils import get_root_logger, imfrombytes
from basicsr.utils.dist_util import master_only
from mmengine.hooks.hook import DATA_BATCH
from mmengine.registry import HOOKS

from drtl_plugin.hooks.base import META_HOOK_REGISTRY, MetaTrainerHook, Runner
from drtl_plugin.relation.graph import KnowledgeGraph
from drtl_plugin.report.figures import draw_camera_fit, draw_graph
from drtl_plugin.report.pictures import comparison_picture
from drtl_plugin.report.tables import BICUBIC, relation_table, write_graph
from drtl_plugin.runtime import checkpoints
from drtl_plugin.runtime.progress import aside


@HOOKS.register_module()
@META_HOOK_REGISTRY.register()
class GraphRecordHook(MetaTrainerHook):
    """Records the camera fit, each new knowledge graph with its weights, and the metrics of each validation.

    ======================== ===============================================================================
    ``camera_fit.pth``       the camera fit (for ``path.pretrain_camera_fit``); ``camera_fit.png``: its kernels
    ``knowledge_graph.json`` the last graph and its weights; ``knowledge_graph.png``: a picture
    ``weights.csv``          relation and weight of each task at each measurement
    ``metrics.csv``          all validations, with the number of training steps before each
    TensorBoard              relations, weights, the graph's picture, crops of validated images
    the log                  the camera fit, and the first relations as a table
    ======================== ===============================================================================
    """

    priority = 'LOW'

    def __init__(self) -> None:
        self._recorded: KnowledgeGraph | None = None
        self._rows: list[list[Any]] = []
        self._metrics: dict[tuple[int, str, str], float] = {}
        self._written: dict[str, dict[str, float]] = {}

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Record the camera fit, and warn if it should not be trusted."""
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

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: DATA_BATCH = None) -> None:
        """Record a graph that was measured since the last iteration."""
        self._record(runner, batch_idx)

    @master_only
    def after_val(self, runner: Runner) -> None:
        """Record the metrics; a validation that a resumed run repeats replaces the first one."""
        for dataset, metrics in runner.validation_results.items():
            if self._written.get(dataset) is metrics:  # an earlier validation
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

    def after_train(self, runner: Runner) -> None:
        """Record the last graph."""
        self._record(runner, runner.iter + 1)

    @master_only
    @aside()
    def _record(self, runner: Runner, iteration: int) -> None:
        graph, weights = runner.graph, runner.weights
        if graph is None or graph is self._recorded:
            return
        if self._recorded is None:
            get_root_logger().info(f'Relation to the target and gradient weight:\n{relation_table(graph, weights)}')
        self._recorded = graph
        folder = Path(runner.opt['path']['experiments_root'])
        rows = list(zip(graph.labels, graph.relation.tolist(), weights.tolist(), strict=True))
        self._rows += [[iteration, *row] for row in rows]
        with open(folder / 'weights.csv', 'w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows([['iteration', 'task', 'relation', 'weight'], *self._rows])
        write_graph(graph, folder / 'knowledge_graph.json', weights)
        draw_graph(graph, folder / 'knowledge_graph.png', weights, runner.fit_share)
        # A figure is a reference cycle that holds megabytes, and a training loop creates too few objects to trigger
        # Python's garbage collection.
        gc.collect()
        writer = runner.tb_logger
        if writer is None:
            return
        for label, relation, weight in rows:
            tag = label.replace(' ', '_')
            writer.add_scalar(f'relation/{tag}', relation, iteration)
            writer.add_scalar(f'weights/{tag}', weight, iteration)
        picture = imfrombytes((folder / 'knowledge_graph.png').read_bytes())[:, :, ::-1].copy()
        writer.add_image('knowledge_graph', picture, iteration, dataformats='HWC')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Put the records into the training state."""
        metrics = [[*key, value] for key, value in self._metrics.items()]
        is_latest = self._recorded is runner.graph
        checkpoint['graph_record'] = {'rows': self._rows, 'is_latest': is_latest, 'metrics': metrics}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Continue the records; a graph that they already contain is not recorded again."""
        if 'graph_record' in checkpoint:
            record = checkpoint['graph_record']
            self._rows = list(record['rows'])
            self._metrics = {
                (iteration, dataset, name): value for iteration, dataset, name, value in record.get('metrics', [])
            }
            if record['is_latest']:
                self._recorded = runner.graph
