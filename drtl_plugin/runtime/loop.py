"""What a training run needs around BasicSR's pipeline: its name to itself, exact resumption, an end in order."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, ModuleType

import filelock
from basicsr.utils import AvgTimer, MessageLogger, set_random_seed
from torch import distributed
from torch.utils.data import Sampler

from drtl_plugin.compat.basicsr import restore_wandb_generate_id
from drtl_plugin.errors import DataError
from drtl_plugin.runtime.checkpoints import random_state, set_random_state
from drtl_plugin.runtime.distributed import any_process
from drtl_plugin.runtime.progress import Pulse, aside, seconds_aside, to_stderr

# Seconds in which a second signal is taken for the first one again.
_SAME_SIGNAL = 2


class _StopNow(BaseException):
    """Raised by a signal where nothing is lost by leaving at once; no ``except Exception`` is to catch it."""


class _StayThroughSignals:
    """A loader process's ``worker_init_fn``: schedulers and terminals signal every process of a run, but loaders are
    needed until the run has saved its state, and are ended by it."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker_id: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker_id)


class _StepTimer(AvgTimer):
    """``AvgTimer`` that leaves out what is done :func:`~drtl_plugin.runtime.progress.aside`."""

    def start(self) -> None:
        super().start()
        self._aside = seconds_aside()

    def record(self) -> None:
        self.tic += seconds_aside() - self._aside
        super().record()
        self._aside = seconds_aside()


class _StepLogger(MessageLogger):
    """``MessageLogger`` that also writes learning rates to TensorBoard, and whose ``eta`` is that of the steps left."""

    def __init__(self, opt: dict, *arguments) -> None:
        super().__init__(opt, *arguments)
        self.max_iters += 1  # BasicSR's eta leaves out the last iteration, and is negative at it

    def __call__(self, log_vars: dict) -> None:
        # BasicSR's eta counts all seconds since start_time, divided by the iterations from start_iter on.
        self.start_iter, self.start_time = log_vars['iter'], time.time() - log_vars['time']
        if self.tb_logger is not None:
            for group, lr in enumerate(log_vars['lrs']):
                self.tb_logger.add_scalar(f'lr_{group}' if group else 'lr', lr, log_vars['iter'])
        super().__call__(log_vars)


class Interrupted(SystemExit):
    """The run was told to stop, and has; its code is what shells expect of the signal."""


@contextlib.contextmanager
def exclusive(folder: str | Path, name: str) -> Iterator[None]:
    """Keep a name to this run for as long as the context lasts, or the process lives.

    Where the file system has no locks, nothing keeps two runs of a name apart.

    Args:
        folder (str | Path): Of the runs of all names; it is created where it is missing.
        name (str): Of the run.

    Raises:
        DataError: If another run, in this process or another one, has the name, or the folder cannot be written.
    """
    # Beside the lock, since Windows lets nobody else read a file that is locked.
    owner = Path(folder, f'.{name}.owner')
    # Forked loader processes that outlive a killed run do not keep the lock: filelock closes it in them.
    lock = filelock.FileLock(Path(folder, f'.{name}.lock'), timeout=0, fallback_to_soft=False)
    try:
        owner.parent.mkdir(parents=True, exist_ok=True)
        with open(owner, 'a', encoding='utf-8'):
            pass
    except OSError as error:
        raise DataError(f'{folder}: cannot be written ({error.strerror}); run it in a folder of your own.') from None
    try:
        lock.acquire()
    except filelock.Timeout:
        raise DataError(
            f'{Path(folder, name)}: another run of this name ({owner.read_text(encoding="utf-8")}) is at work; wait '
            'for it, stop it, or choose another name.'
        ) from None
    except OSError:  # the file system knows no locks
        pass
    try:
        owner.write_text(f'process {os.getpid()} of {socket.gethostname()}', encoding='utf-8')
        yield
    finally:
        lock.release()


class TrainingRun:
    """One run of ``basicsr.train.train_pipeline``, which lasts as a context does.

    BasicSR leaves out, and this adds: a resumed run goes on with the samples that it has not seen yet, with the
    shared random generators where they were, and repeats the validation that belongs to the state's iteration, which
    draws from copies of these. SIGINT and SIGTERM end a run between two iterations, or in validation and adaptation,
    with its state saved; a second one (after two seconds), or one before there is anything to save, ends it at once.
    The logged ``time`` and ``eta`` are those of training steps, without validation, saving, adaptation and measuring
    the relation. Slow iterations are reported before BasicSR logs its first line. The last iteration is validated once.
    TensorBoard also gets the learning rate and the option file.

    Args:
        opt (dict): Parsed options.

    Attributes:
        model: What BasicSR has built.
    """

    def __init__(self, opt: dict) -> None:
        self.opt = opt
        self.model = None
        self._pipeline: ModuleType = importlib.import_module('basicsr.train')
        self._resume_state: dict | None = None
        self._val_loaders: list = []
        self._validated_at: dict = {}  # iteration of the last validation by loader
        self._tb_logger = None
        self._sampler: Sampler | None = None
        self._loader_processes: weakref.WeakSet[BaseProcess] = weakref.WeakSet()
        self._first_iter: int | None = None  # of this process; None before there is any
        self._may_stop_now = False  # in validation, adaptation included, which changes nothing that is saved
        self._signal: signal.Signals | None = None
        self._signalled = 0.0
        self._handlers: dict[int, object] = {}
        self._pid = os.getpid()

    def __enter__(self) -> TrainingRun:
        pipeline = self._pipeline
        with contextlib.ExitStack() as stack:
            replacements = {
                name: _calling(getattr(self, f'_{name}'), getattr(pipeline, name))
                for name in (
                    *('load_resume_state', 'create_train_val_dataloader', 'build_dataloader', 'init_tb_loggers'),
                    *('build_model', 'copy_opt_file'),
                )
            }
            replacements.update(EnlargedSampler=self._sampler_class(), AvgTimer=_StepTimer, MessageLogger=_StepLogger)
            for name, replacement in replacements.items():
                stack.callback(setattr, pipeline, name, getattr(pipeline, name))
                setattr(pipeline, name, replacement)
            if self.opt.get('train', {}).get('total_iter') == 0:  # adaptation only
                logger = logging.getLogger('basicsr')
                logger.addFilter(_is_not_about_training)
                stack.callback(logger.removeFilter, _is_not_about_training)
            self._stack = stack.pop_all()
        # Where another thread runs it (in a notebook, say), signals are not ours to take.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._take_signal)
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        self._stack.close()
        if kind is not Interrupted:  # else the process is to end by its exit code, not by the signal once more
            self._restore_signals()
        _end_loaders(self._loader_processes)
        if self._tb_logger is not None:
            self._tb_logger.close()

    # ---- in the place of what the pipeline calls -------------------------------------------------------------- #

    def _load_resume_state(self, load, opt: dict) -> dict | None:
        self._resume_state = load(opt)
        return self._resume_state

    def _copy_opt_file(self, copy, opt_file: str, experiments_root: str) -> None:
        kept = Path(experiments_root, Path(opt_file).name)
        if self.opt['rank'] != 0 or (kept.exists() and kept.samefile(opt_file)):  # a run resumed by its own copy
            return
        # BasicSR writes its copy in the locale's encoding, which may not hold the command that it adds.
        head = f'# GENERATE TIME: {time.asctime()}\n# CMD:\n# {" ".join(sys.argv)}\n\n'
        kept.write_text(head + Path(opt_file).read_text(encoding='utf-8'), encoding='utf-8')

    def _create_train_val_dataloader(self, create, opt: dict, logger) -> tuple:
        result = create(opt, logger)
        self._sampler, self._val_loaders = result[1], result[2]
        return result

    def _init_tb_loggers(self, init, opt: dict):
        if (opt['logger'].get('wandb') or {}).get('project'):
            restore_wandb_generate_id()
        self._tb_logger = init(opt)
        if self._tb_logger is not None:
            for path in sorted(Path(opt['path']['experiments_root']).glob('*.yml')):
                text = path.read_text(encoding='utf-8')
                self._tb_logger.add_text(f'options/{path.name}', f'```yaml\n{text}\n```', self._resumed_iter)
        return self._tb_logger

    def _build_dataloader(self, build, *arguments, **options):
        loader = build(*arguments, **options)
        if loader.num_workers:
            loader.worker_init_fn = _StayThroughSignals(loader.worker_init_fn)
            loader.multiprocessing_context = _noting_context(self._loader_processes)
        return loader

    def _build_model(self, build, opt: dict):
        model = self.model = build(opt)
        model.tb_logger = self._tb_logger
        for name in ('resume_training', 'update_learning_rate', 'optimize_parameters', 'save', 'validation'):
            setattr(model, name, _calling(getattr(self, f'_{name}'), getattr(model, name)))
        return model

    def _sampler_class(self) -> type:
        run, sampler_class = self, self._pipeline.EnlargedSampler

        class ResumingSampler(sampler_class):
            """``EnlargedSampler`` that leaves out, in the epoch that was interrupted, what was seen before."""

            def __iter__(self):
                indices = list(super().__iter__())
                state = run._resume_state
                if state is None or self.epoch != state['epoch']:
                    return iter(indices)
                # Only now: building the loader's iterator has drawn from the shared generators, too.
                if run.opt.get('rank'):  # the state is the first process's
                    set_random_seed((run.opt['manual_seed'] + run.opt['rank'] + 1000 * state['iter']) % 2**32)
                elif 'random' in state:
                    set_random_state(state['random'])
                seen = max(0, state['iter'] - self.epoch * run._steps_of_epoch(self))
                return iter(indices[seen * _loader_batch_size(run.opt) :])

        return ResumingSampler

    # ---- in the place of what it calls of the model ----------------------------------------------------------- #

    def _resume_training(self, resume, state: dict) -> None:
        resume(state)
        # A state is as before the validation of its iteration, which may not have come to its end.
        val = self.opt.get('val')
        if val is not None and state['iter'] % val['val_freq'] == 0:
            for loader in self._val_loaders:
                self.model.validation(loader, state['iter'], self._tb_logger, val['save_img'])

    def _update_learning_rate(self, update, current_iter: int, **arguments) -> None:
        if self._first_iter is None:
            self._first_iter, self._pulse = current_iter, Pulse()
        else:
            self._stop_if_told(current_iter - 1)
        update(current_iter, **arguments)

    def _optimize_parameters(self, optimize, current_iter: int) -> None:
        optimize(current_iter)
        print_freq = self.opt['logger']['print_freq']
        if current_iter // print_freq == (self._first_iter - 1) // print_freq:  # before BasicSR's first line
            line = f'Iteration {current_iter} of {self._last_iter} is done; '
            self._pulse.beat(f'{line}the log has losses and times every {print_freq} iterations.')

    def _save(self, save, epoch: int, current_iter: int) -> None:
        is_last = current_iter == -1
        if is_last:
            self._stop_if_told(self._last_iter)
        with aside():
            save(epoch, current_iter)
        if is_last:  # a signal has cut its adaptation short
            self._stop_if_told(self._last_iter)

    def _validation(self, validate, dataloader, current_iter, *arguments) -> None:
        # After the last iteration BasicSR's count is at least one too high, and it validates once more.
        current_iter = min(current_iter, self._last_iter)
        before = random_state()
        try:
            # Of several processes, the first one validates alone; but they stop together.
            self._may_stop_now = not self.opt['dist']
            if self._signal is not None and self._may_stop_now:
                raise _StopNow
            if self._validated_at.get(dataloader) != current_iter:
                with aside():
                    validate(dataloader, current_iter, *arguments)
                self._validated_at[dataloader] = current_iter
            self._may_stop_now = False
        except _StopNow:
            set_random_state(before)
            self._stop(current_iter)
        # Training goes on as if it had not been validated: the passes that resuming repeats must not matter.
        set_random_state(before)

    # ---- ending ----------------------------------------------------------------------------------------------- #

    def _restore_signals(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _take_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a loader process that has just begun
        if self._signal is not None:
            # A launcher passes on what the whole group has had already.
            if number == self._signal and time.monotonic() - self._signalled > _SAME_SIGNAL:
                self._restore_signals()
                os.kill(self._pid, number)
            return
        self._signal, self._signalled = signal.Signals(number), time.monotonic()
        if self._first_iter is None:
            self._end('before there was anything to save')
        # Of several processes, the first one validates alone; to its end, since it tells the others nothing.
        self.model.stopping = not self.opt['dist']
        to_stderr(f'{self._signal.name}: the state is saved after this iteration; once more ends the run at once.')
        if self._may_stop_now:
            self._may_stop_now = False
            raise _StopNow

    @property
    def _resumed_iter(self) -> int:
        return 0 if self._resume_state is None else self._resume_state['iter']

    @property
    def _last_iter(self) -> int:
        return max(int(self.opt['train']['total_iter']), self._resumed_iter)

    def _steps_of_epoch(self, sampler: Sampler) -> int:
        return sampler.num_samples // _loader_batch_size(self.opt)

    def _stop_if_told(self, iteration: int) -> None:
        if self._first_iter is not None and any_process(self._signal is not None):
            self._stop(iteration)

    def _stop(self, iteration: int) -> None:
        """Save the state after an iteration, and end the run."""
        # After the last iteration BasicSR goes on counting epochs.
        epoch = min(self._sampler.epoch, (iteration - 1) // max(1, self._steps_of_epoch(self._sampler)))
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        self.model.stopping = True
        self.model.save(epoch, iteration)
        if self.opt['dist']:  # a launcher ends the others as soon as one has ended
            distributed.barrier()
        self._end(f'after iteration {iteration}; go on with --auto_resume')

    def _end(self, when: str) -> None:
        number = self._signal or signal.SIGTERM  # or another process's
        to_stderr(f'stopped by {number.name} {when}.')
        raise Interrupted(128 + number)


def _is_not_about_training(record: logging.LogRecord) -> bool:
    """A log filter for runs without iterations, which drops BasicSR's lines about a training that never was."""
    return not str(record.msg).startswith(('Start training from', 'End of training.', 'Save the latest model.'))


class _LoaderProcess:
    """A loader process's ``target``.

    A process that is spawned unpickles its target before its data set. This class brings in the package, and with it
    the repairs without which a data set of BasicSR's own could not be unpickled.
    """

    def __init__(self, target: Callable) -> None:
        self.target = target

    def __call__(self, *args) -> None:
        self.target(*args)


def _noting_context(processes: weakref.WeakSet[BaseProcess]) -> BaseContext:
    """The context that processes are started in by default, which also adds each of them to a set."""
    context = copy.copy(multiprocessing.get_context())
    make_process = context.Process

    def make_and_note(*args, target: Callable, **kwargs) -> BaseProcess:
        process = make_process(*args, target=_LoaderProcess(target), **kwargs)
        processes.add(process)
        return process

    context.Process = make_and_note
    return context


def _end_loaders(started: Collection[BaseProcess]) -> None:
    """End the loader processes that a run has started, and no others.

    After an error, or with a prefetcher, they wait for work, and Python would wait for them.
    """
    loaders = [child for child in multiprocessing.active_children() if child in started]
    if not loaders or threading.current_thread() is not threading.main_thread():
        return
    # torch would raise the death of a loader as an error. (Windows has no such signal.)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if hasattr(signal, 'SIGCHLD') else None
    for loader in loaders:
        loader.kill()
        loader.join()
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def _calling(ours: Callable, theirs: Callable) -> Callable:
    """A function that gives ours theirs as the first argument."""
    return functools.wraps(theirs)(functools.partial(ours, theirs))


def _loader_batch_size(opt: dict) -> int:
    """Samples a step that a process loads, as ``build_dataloader`` has it."""
    devices = 1 if opt['dist'] else max(opt['num_gpu'], 1)
    return opt['datasets']['train']['batch_size_per_gpu'] * devices
