"""Lets several datasets of one process use the same LMDB."""

from __future__ import annotations

import os
from typing import Any

import lmdb
from basicsr.utils.file_client import FileClient, LmdbBackend

_environments: dict[str, Any] = {}


class SharedLmdbBackend(LmdbBackend):
    """``LmdbBackend`` that shares its read-only environments within the process."""

    def __init__(self, db_paths, client_keys='default', readonly=True, lock=False, readahead=False, **kwargs):
        if not readonly or lock:
            super().__init__(db_paths, client_keys, readonly, lock, readahead, **kwargs)
            return
        self.db_paths = [str(path) for path in (db_paths if isinstance(db_paths, list) else [db_paths])]
        keys = [client_keys] if isinstance(client_keys, str) else client_keys
        if len(keys) != len(self.db_paths):
            raise ValueError(f'client_keys and db_paths differ in length: {keys} and {self.db_paths}.')
        self._client = {}
        for key, path in zip(keys, self.db_paths, strict=True):
            real = os.path.realpath(path)
            if real not in _environments:
                _environments[real] = lmdb.open(real, readonly=True, lock=False, readahead=readahead, **kwargs)
            self._client[key] = _environments[real]


def share_environments() -> bool:
    """Let several datasets of one process read the same LMDB.

    Fault: ``basicsr.utils.file_client.LmdbBackend`` opens its databases again for each dataset, and lmdb refuses to
    open a database twice in a process, forked loader workers included. Read-only environments are now opened once and
    shared. They are opened without locks, so a forked process can read through them.

    Returns:
        bool: Whether a repair was needed.
    """
    if FileClient._backends['lmdb'] is not LmdbBackend:
        return False
    FileClient._backends['lmdb'] = SharedLmdbBackend
    return True
