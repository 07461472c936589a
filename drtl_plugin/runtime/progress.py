"""What a run shows during work that takes longer than a moment: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from basicsr.utils.dist_util import get_dist_info
from tqdm import tqdm

T = TypeVar('T')

# Seconds until a loop first says how far it is, and between two such lines.
_FIRST, _INTERVAL = 2, 10

_aside = 0.0  # seconds of this process in finished aside() blocks
_is_aside = False


def seconds_aside() -> float:
    """Seconds that this process has spent in :func:`aside` so far; to be called outside of it."""
    return _aside


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Time the block as work beside the training steps, such as validation. Inner blocks count once."""
    global _aside, _is_aside
    if _is_aside:
        yield
        return
    started, _is_aside = time.monotonic(), True
    try:
        yield
    finally:
        _is_aside = False
        _aside += time.monotonic() - started


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Log the start of a block, and how long it took; the block counts as :func:`aside`.

    Args:
        name (str): A sentence's beginning, e.g. ``'Measuring the relation'``.
    """
    say(f'{name}.')
    started = time.monotonic()
    with aside():
        yield
    say(f'{name} took {time.monotonic() - started:.1f} s.')


def say(line: str) -> None:
    """Log a line, in the first process; where BasicSR's log is off and no terminal shows bars, write it to stderr."""
    if get_dist_info()[0] != 0:
        return
    logger = logging.getLogger('basicsr')
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, line, (), None)
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers() and logger.filter(record):
        logger.handle(record)
    elif not sys.stderr.isatty():
        to_stderr(line)


def to_stderr(line: str) -> None:
    """Write a line to stderr, if anyone still reads it."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        print(f'basicsr: {line}', file=sys.stderr, flush=True)


class Pulse:
    """Says how far a loop is: first after 2 seconds, then every 10."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _FIRST

    def beat(self, line: str) -> None:
        """Say the line if one is due."""
        if time.monotonic() >= self._next:
            say(line)
            self._next = time.monotonic() + _INTERVAL


def progress(items: Iterable[T], name: str, total: int, unit: str = 'step', pulse: Pulse | None = None) -> Iterator[T]:
    """Iterate with a bar on a terminal, and with a line now and then elsewhere.

    Args:
        items (Iterable[T]): What to iterate over.
        name (str): Of the work, e.g. ``'adaptation'``.
        total (int): Number of items.
        unit (str): What an item is, in the singular.
        pulse (Pulse | None): Of nested loops that take turns at their lines; the bars of such loops wait 2 seconds.

    Yields:
        T: The items.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, name, total, unit=unit, leave=False, delay=0 if pulse is None else _FIRST)
        return
    pulse = pulse or Pulse()
    for count, item in enumerate(items, 1):
        yield item
        pulse.beat(f'{name}: {count} of {total} {unit}s')
