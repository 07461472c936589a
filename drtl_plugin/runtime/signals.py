"""Ends a training run cleanly on SIGINT and SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from drtl_plugin.runtime.distributed import any_process
from drtl_plugin.runtime.progress import to_stderr

# Seconds within which a repeated signal counts as the first one: launchers forward what the whole group has received.
_SAME_SIGNAL = 2


class StopNow(BaseException):
    """Raised by a signal in an :meth:`StopSignals.interruptible` block; ``except Exception`` must not catch it."""


class Interrupted(SystemExit):
    """The run was told to stop, and has stopped; the exit code is the one that shells expect for the signal."""


class StopSignals:
    """Handles SIGINT and SIGTERM while the context lasts.

    Before :meth:`begin`, a signal ends the run at once. Afterwards it is remembered, until the run asks by
    :meth:`told`, saves its state and calls :meth:`end`. The same signal again, after two seconds, acts as without this
    class. Only the main thread of the main process handles signals.

    Args:
        dist (bool): Whether several processes train. Then they stop together, and no block is interruptible.
    """

    def __init__(self, dist: bool = False) -> None:
        self._dist = dist
        self._model: Any = None  # set once there is something to save
        self._what = ''
        self._may_stop_now = False
        self._signal: signal.Signals | None = None
        self._signalled = 0.0
        self._handlers: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is not Interrupted:  # otherwise further signals must not change the exit code
            self._restore()

    def begin(self, model: Any, what: str = 'the state is saved after this iteration') -> None:
        """From now on there is something to save.

        Args:
            model: Its attribute ``stopping`` is set by a signal.
            what (str): What follows a signal, for the message on stderr.
        """
        self._model, self._what = model, what

    def told(self) -> bool:
        """Whether any process was told to stop; every process has to ask. False before :meth:`begin`."""
        return self._model is not None and any_process(self._signal is not None)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a signal, even an earlier one, ends at once.

        Raises:
            StopNow: In the block, or at its start.
        """
        self._may_stop_now = not self._dist
        try:
            if self._signal is not None and self._may_stop_now:
                raise StopNow
            yield
        finally:
            self._may_stop_now = False

    def ignore(self) -> None:
        """Ignore further signals, while the state is saved."""
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)

    def end(self, when: str) -> NoReturn:
        """End the run.

        Args:
            when (str): For the message on stderr, e.g. ``'after iteration 3'``.

        Raises:
            Interrupted: Always.
        """
        number = self._signal or signal.SIGTERM  # another process received it
        to_stderr(f'stopped by {number.name} {when}.')
        raise Interrupted(128 + number)

    def _restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a loader process that has just started
        if self._signal is not None:
            if number == self._signal and time.monotonic() - self._signalled > _SAME_SIGNAL:
                self._restore()
                os.kill(self._pid, number)
            return
        self._signal, self._signalled = signal.Signals(number), time.monotonic()
        if self._model is None:
            self.end('before there was anything to save')
        # With several processes, the first one validates to the end: it cannot tell the others.
        self._model.stopping = not self._dist
        to_stderr(f'{self._signal.name}: {self._what}; a second signal ends the run at once.')
        if self._may_stop_now:
            self._may_stop_now = False
            raise StopNow
