"""The loader processes of a training run: they survive the run's signals, and end with the run."""

from __future__ import annotations

import copy
import multiprocessing
import signal
import threading
import weakref
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader


class LoaderProcesses:
    """The processes of the loaders passed to :meth:`adopt`."""

    def __init__(self) -> None:
        self._started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()

    def adopt(self, loader: DataLoader) -> None:
        """Take charge of the processes that a loader will start."""
        if loader.num_workers:
            loader.worker_init_fn = _IgnoringSignals(loader.worker_init_fn)
            loader.multiprocessing_context = self._context()

    def end(self) -> None:
        """End the processes.

        After an error, or with a prefetcher, they wait for work, and Python would wait for them.
        """
        processes = [child for child in multiprocessing.active_children() if child in self._started]
        if not processes or threading.current_thread() is not threading.main_thread():
            return
        # torch would raise an error when a loader dies. (Windows has no such signal.)
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if hasattr(signal, 'SIGCHLD') else None
        for process in processes:
            process.kill()
            process.join()
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)

    def _context(self) -> BaseContext:
        """The default context for starting processes, which also records each of them."""
        context: Any = copy.copy(multiprocessing.get_context())
        make_process, started = context.Process, self._started

        def make_and_note(*args, target: Callable, **kwargs) -> BaseProcess:
            process = make_process(*args, target=_Target(target), **kwargs)
            started.add(process)
            return process

        context.Process = make_and_note
        return context


class _IgnoringSignals:
    """A ``worker_init_fn``: terminals and schedulers signal every process of a run, but a run needs its loaders until
    it has saved its state."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker_id: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker_id)


class _Target:
    """A process's ``target``. A spawned process unpickles it before the dataset, and imports this package with it,
    whose fixes a dataset of BasicSR needs."""

    def __init__(self, target: Callable) -> None:
        self.target = target

    def __call__(self, *args) -> None:
        self.target(*args)
