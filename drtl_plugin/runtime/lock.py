"""One run per name at a time."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

from drtl_plugin.errors import DataError


@contextlib.contextmanager
def exclusive(folder: str | Path, name: str) -> Iterator[None]:
    """Reserve a run's name until the context, or the process, ends.

    On file systems without locks, nothing is reserved.

    Args:
        folder (str | Path): Parent folder of the runs; created if missing.
        name (str): Name of the run.

    Raises:
        DataError: If another run, in this process or another one, has the name, or the folder cannot be written.
    """
    # A file of its own: on Windows, nobody else can read a locked file.
    owner = Path(folder, f'.{name}.owner')
    # Forked loader processes that outlive a killed run do not keep the lock: filelock closes it in them.
    lock = filelock.FileLock(Path(folder, f'.{name}.lock'), timeout=0, fallback_to_soft=False)
    try:
        owner.parent.mkdir(parents=True, exist_ok=True)
        with open(owner, 'a', encoding='utf-8'):
            pass
    except OSError as error:
        raise DataError(
            f'{folder}: cannot be written ({error.strerror}); run it in a folder that you can write to.'
        ) from None
    try:
        lock.acquire()
    except filelock.Timeout:
        raise DataError(
            f'{Path(folder, name)}: another run of this name ({owner.read_text(encoding="utf-8")}) is active; wait '
            'for it, stop it, or choose another name.'
        ) from None
    except OSError:  # the file system has no locks
        pass
    try:
        owner.write_text(f'process {os.getpid()} of {socket.gethostname()}', encoding='utf-8')
        yield
    finally:
        lock.release()
