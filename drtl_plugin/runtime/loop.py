"""Our training and testing loops, built on BasicSR's public builders."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.prefetch_dataloader import CPUPrefetcher, CUDAPrefetcher
from basicsr.models import build_model
from basicsr.utils import get_root_logger, mkdir_and_rename
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from drtl_plugin.compat.basicsr import make_exp_dirs, without_gpu
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.runtime.loaders import LoaderProcesses
from drtl_plugin.runtime.progress import Pulse, aside
from drtl_plugin.runtime.resume import ResumingSampler, load_resume_state, record_launch, restoring_random_state
from drtl_plugin.runtime.signals import Interrupted, StopNow, StopSignals
from drtl_plugin.runtime.training_log import StepLogger, StepTimer, keep_option_file, open_log, open_tensorboard


def train(
    opt: dict,
    option_file: str,
    datasets: Mapping[str, Dataset] | None = None,
    finish: Callable[[Any], object] = lambda model: None,
    keeps_folder: bool = False,
) -> Any:
    """Train as ``basicsr.train.train_pipeline`` does; weights and optimiser states are bit-identical.

    In addition:

    - A resumed run continues with the samples that it has not seen, and restores the shared random generators.
      It repeats the validation that belongs to the state's iteration.
    - SIGINT and SIGTERM end a run between two iterations, or during validation and adaptation, with its state saved. A
      second signal (after two seconds), or one before there is anything to save, ends it at once. The first one does
      not interrupt ``finish``.
    - Validation does not change the course of training: it draws from copies of the random generators.
    - The last iteration is validated once. Training continues until ``total_iter``, even if BasicSR's loop counts too
      few epochs because incomplete batches are dropped.
    - ``time`` and ``eta`` in the log are those of training steps, without validation, saving, adaptation and measuring
      the relation. Slow iterations are reported before the first line of losses.
    - TensorBoard also receives the learning rate and the option file.
    - Loader processes end with the run.

    Args:
        opt (dict): Parsed options (:func:`drtl_plugin.options.parse.parse_options`).
        option_file (str): The option file, of which the first process keeps a copy in the experiment's folder.
        datasets (Mapping[str, Dataset] | None): Datasets that are already built, by phase; the others are built here.
        finish (Callable): Called with the trained model at the end, e.g. to write a report.
        keeps_folder (bool): Whether the folder of the run's name is its own, even if there is no state to resume from.

    Returns:
        The trained model. It had ``train_set`` and ``tb_logger`` set before its first step.

    Raises:
        DataError: If the training data, or the state to resume from, is not usable.
        OptionError: If an option is wrong.
        Interrupted: After a signal.
    """
    with without_gpu(), StopSignals(opt['dist']) as signals:
        with contextlib.ExitStack() as stack:
            training = _Training(opt, option_file, datasets or {}, signals, stack, keeps_folder)
            training.run()
        signals.begin(training.model, 'the run is complete and ends in a moment')
        finish(training.model)
    return training.model


def test(opt: dict, datasets: Mapping[str, Dataset] | None = None) -> None:
    """Test as ``basicsr.test.test_pipeline`` does: metrics in the log, images in ``results/``.

    Args:
        opt (dict), datasets (Mapping[str, Dataset] | None): See :func:`train`.
    """
    torch.backends.cudnn.benchmark = True
    make_exp_dirs(opt)
    logger = open_log(opt, 'test')
    with without_gpu():
        loaders = [_validation_loader(opt, phase, datasets or {}) for phase in sorted(opt['datasets'])]
        model = build_model(opt)
        for loader in loaders:
            dataset: Any = loader.dataset
            logger.info(f'Testing {dataset.opt["name"]}...')
            model.validation(loader, opt['name'], None, opt['val']['save_img'])


def _dataset(opt: dict, phase: str, datasets: Mapping[str, Dataset]) -> Any:
    return datasets[phase] if phase in datasets else build_dataset(opt['datasets'][phase])


def _validation_loader(opt: dict, phase: str, datasets: Mapping[str, Dataset]) -> DataLoader:
    section, dataset = opt['datasets'][phase], _dataset(opt, phase, datasets)
    get_root_logger().info(f'Number of images in {section["name"]}: {len(dataset)}')
    return build_dataloader(dataset, section, num_gpu=opt['num_gpu'], dist=opt['dist'], seed=opt['manual_seed'])


class _Training:
    """One training run; see :func:`train`.

    Args:
        opt (dict), option_file (str), datasets (Mapping[str, Dataset]): See :func:`train`.
        signals (StopSignals): Tells the run to stop.
        stack (contextlib.ExitStack): Closes what the run opens.
        keeps_folder (bool): See :func:`train`.

    Attributes:
        model: BasicSR's or our model.
    """

    def __init__(
        self,
        opt: dict,
        option_file: str,
        datasets: Mapping[str, Dataset],
        signals: StopSignals,
        stack: contextlib.ExitStack,
        keeps_folder: bool,
    ) -> None:
        torch.backends.cudnn.benchmark = True
        self.opt, self.signals = opt, signals
        opt['root_path'] = str(Path(opt['path']['experiments_root']).parents[1])
        for phase in opt['datasets']:
            if phase.split('_')[0] not in ('train', 'val'):
                raise OptionError(f'datasets.{phase}: training has the phases train, val, val_2, …')
        state = load_resume_state(opt)
        if state is None and not keeps_folder:
            make_exp_dirs(opt)
            if opt['logger'].get('use_tb_logger') and 'debug' not in opt['name'] and opt['rank'] == 0:
                mkdir_and_rename(str(Path(opt['root_path'], 'tb_logger', opt['name'])))
        record_launch(opt)
        if opt['rank'] == 0:
            keep_option_file(option_file, opt['path']['experiments_root'])
        self.logger = open_log(opt, 'train')
        self.iter: int = 0 if state is None else state['iter']
        self.total_iter = max(int(opt['train']['total_iter']), self.iter)
        self.tb_logger = open_tensorboard(opt, self.iter)
        if self.tb_logger is not None:
            stack.callback(self.tb_logger.close)
        self.validated: dict[DataLoader, int] = {}  # iteration of the last validation

        train_set = _dataset(opt, 'train', datasets)
        self.sampler = ResumingSampler(train_set, opt, state)
        self.train_loader = self._build_train_loader(train_set, stack)
        phases = [phase for phase in opt['datasets'] if phase.split('_')[0] == 'val']
        self.val_loaders = [_validation_loader(opt, phase, datasets) for phase in phases]

        self.model = build_model(opt)
        self.model.train_set, self.model.tb_logger = train_set, self.tb_logger
        self.first_epoch = 0
        if state is not None:
            self.model.resume_training(state)
            self.first_epoch = state['epoch']
            self.logger.info(f'Resuming training from epoch: {self.first_epoch}, iter: {self.iter}.')
            # The state was saved before the validation of its iteration, which may not have been completed.
            if self._is_due('val', 'val_freq'):
                self._validate()

    def _build_train_loader(self, train_set: Any, stack: contextlib.ExitStack) -> DataLoader:
        opt, section = self.opt, self.opt['datasets']['train']
        arguments = {'num_gpu': opt['num_gpu'], 'dist': opt['dist'], 'sampler': self.sampler}
        loader = build_dataloader(train_set, section, **arguments, seed=opt['manual_seed'])
        loaders = LoaderProcesses()
        stack.callback(loaders.end)
        loaders.adopt(loader)
        if self.total_iter > 0:
            if len(loader) == 0:
                raise DataError(
                    f'datasets.train: its {len(train_set)} images are fewer than the {self.sampler.batch_size} of a '
                    'step; lower batch_size_per_gpu, or raise dataset_enlarge_ratio.'
                )
            self.logger.info(
                f'Training statistics:\n\tNumber of train images: {len(train_set)}'
                f'\n\tDataset enlarge ratio: {section.get("dataset_enlarge_ratio", 1)}'
                f'\n\tBatch size per gpu: {section["batch_size_per_gpu"]}'
                f'\n\tWorld size (gpu number): {opt["world_size"]}'
                f'\n\tRequire iter number per epoch: {len(loader)}'
                f'\n\tTotal epochs: {-(-self.total_iter // len(loader))}; iters: {self.total_iter}.'
            )
        return loader

    def run(self) -> None:
        """Train, save the last networks and validate."""
        is_training = int(self.opt['train']['total_iter']) > 0  # a model may only adapt
        if is_training:
            self.logger.info(f'Start training from epoch: {self.first_epoch}, iter: {self.iter}')
        started = time.time()
        if self.iter < self.total_iter:
            self._steps()
            duration = datetime.timedelta(seconds=int(time.time() - started))
            self.logger.info(f'End of training. Time consumed: {duration}')
        if is_training:
            self.logger.info('Save the latest model.')
        with aside():
            self.model.save(epoch=-1, current_iter=-1)
        self._stop_if_told()  # a signal has cut adaptation short
        if self.opt.get('val') is not None:
            self._validate()

    def _steps(self) -> None:
        """All remaining iterations."""
        opt, model = self.opt, self.model
        log = StepLogger(opt, self.iter, self.tb_logger)
        prefetcher = self._prefetcher()
        data_timer, iter_timer = StepTimer(), StepTimer()
        first_line = (self.iter // opt['logger']['print_freq'] + 1) * opt['logger']['print_freq']
        pulse = Pulse()
        for epoch in itertools.count(self.first_epoch):
            self.sampler.set_epoch(epoch)
            prefetcher.reset()
            while (data := prefetcher.next()) is not None:
                data_timer.record()
                self.iter += 1
                self.signals.begin(model)
                model.update_learning_rate(self.iter, warmup_iter=opt['train'].get('warmup_iter', -1))
                model.feed_data(data)
                model.optimize_parameters(self.iter)
                iter_timer.record()
                if self.iter < first_line:
                    line = f'Iteration {self.iter} of {self.total_iter} is done; the log has losses and times every '
                    pulse.beat(f'{line}{opt["logger"]["print_freq"]} iterations.')
                if self._is_due('logger', 'print_freq'):
                    times = {'time': iter_timer.get_avg_time(), 'data_time': data_timer.get_avg_time()}
                    lrs = {'lrs': model.get_current_learning_rate()}
                    log({'epoch': epoch, 'iter': self.iter, **lrs, **times, **model.get_current_log()})
                if self._is_due('logger', 'save_checkpoint_freq'):
                    self.logger.info('Saving models and training states.')
                    with aside():
                        model.save(epoch, self.iter)
                if self._is_due('val', 'val_freq'):
                    self._validate()
                self._stop_if_told()
                if self.iter == self.total_iter:
                    return
                data_timer.start()
                iter_timer.start()

    def _prefetcher(self) -> CPUPrefetcher | CUDAPrefetcher:
        section = self.opt['datasets']['train']
        mode = section.get('prefetch_mode')
        if mode in (None, 'cpu'):
            return CPUPrefetcher(self.train_loader)
        if mode != 'cuda':
            raise OptionError(f'datasets.train.prefetch_mode: {mode!r} is not one of cpu, cuda.')
        if section.get('pin_memory') is not True:
            raise OptionError('datasets.train.pin_memory: prefetch_mode: cuda needs pin_memory: true.')
        self.logger.info('Use cuda prefetch dataloader')
        return CUDAPrefetcher(self.train_loader, self.opt)

    def _is_due(self, section: str, key: str) -> bool:
        return self.opt.get(section) is not None and self.iter % self.opt[section][key] == 0

    def _validate(self) -> None:
        """Validate on all sets that this iteration has not been validated on."""
        for loader in self.val_loaders:
            if self.validated.get(loader) == self.iter:
                continue
            try:
                with restoring_random_state(), self.signals.interruptible(), aside():
                    self.model.validation(loader, self.iter, self.tb_logger, self.opt['val']['save_img'])
            except StopNow:
                self._stop()
            self.validated[loader] = self.iter

    def _stop_if_told(self) -> None:
        if self.signals.told():
            self._stop()

    def _stop(self) -> None:
        """Save the state after this iteration, and end the run.

        Raises:
            Interrupted: Always.
        """
        self.signals.ignore()
        self.model.stopping = True
        self.model.save(self.sampler.epoch, self.iter)
        if self.opt['dist']:  # a launcher ends the others as soon as one ends
            distributed.barrier()
        self.signals.end(f'after iteration {self.iter}; continue with --auto_resume')


__all__ = ['Interrupted', 'test', 'train']
