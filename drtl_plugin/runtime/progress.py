"""Progress of long work: bars on a terminal, lines elsewhere."""

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

# Seconds until the first progress line of a loop, and between lines.
_FIRST, _INTERVAL = 2, 10

_aside = 0.0  # seconds in finished aside() blocks
_is_aside = False


def seconds_aside() -> float:
    """Seconds that this process has spent in :func:`aside`; call it outside of such a block."""
    return _aside


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Time a block of work other than training steps, e.g. validation. Nested blocks count once."""
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
    """Log the start and the duration of a block, which counts as :func:`aside`.

    Args:
        name (str): Beginning of the sentence, e.g. ``'Measuring the relation'``.
    """
    say(f'{name}.')
    started = time.monotonic()
    with aside():
        yield
    say(f'{name} took {time.monotonic() - started:.1f} s.')


def say(line: str) -> None:
    """Log a line in the first process; if BasicSR's log is off and stderr is not a terminal, print it to stderr."""
    if get_dist_info()[0] != 0:
        return
    logger = logging.getLogger('basicsr')
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, line, (), None)
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers() and logger.filter(record):
        logger.handle(record)
    elif not sys.stderr.isatty():
        to_stderr(line)


def to_stderr(line: str) -> None:
    """Write a line to stderr; ignore a closed stderr."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        print(f'basicsr: {line}', file=sys.stderr, flush=True)


class Pulse:
    """Prints the progress of a loop, first after 2 seconds, then every 10."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _FIRST

    def beat(self, line: str) -> None:
        """Print the line if one is due."""
        if time.monotonic() >= self._next:
            say(line)
            self._next = time.monotonic() + _INTERVAL


def progress(items: Iterable[T], name: str, total: int, unit: str = 'step', pulse: Pulse | None = None) -> Iterator[T]:
    """Iterate with a bar on a terminal, or with a line every 10 seconds elsewhere.

    Args:
        items (Iterable[T]): Items to iterate over.
        name (str): Name of the work, e.g. ``'adaptation'``.
        total (int): Number of items.
        unit (str): Name of an item, in the singular.
        pulse (Pulse | None): Shared by nested loops, whose lines then alternate and whose bars appear after 2 seconds.

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
