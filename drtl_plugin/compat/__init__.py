"""Fixes that make BasicSR 1.4.2 work with current torch, torchvision, SciPy and Python, and without a GPU.

Each fix names the fault that it works around, and leaves a working installation alone.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator


def prepare_import() -> None:
    """Apply the fixes without which ``import basicsr`` fails. May be called again."""
    torchvision = importlib.import_module('drtl_plugin.compat.torchvision')
    torchvision.define_missing_operators()
    torchvision.restore_functional_tensor()
    importlib.import_module('drtl_plugin.compat.modules').restore_modules()


@contextlib.contextmanager
def preparing_import() -> Iterator[None]:
    """The context for importing BasicSR.

    Fault: it imports ``scipy.stats``, which takes a second, for a function that one degradation calls.
    """
    prepare_import()
    with importlib.import_module('drtl_plugin.compat.deferred').deferred('scipy.stats', 'multivariate_normal'):
        yield


def repair() -> None:
    """Apply all fixes; ``import basicsr`` succeeds afterwards. May be called again."""
    prepare_import()
    importlib.import_module('drtl_plugin.compat.lmdb').share_environments()
    importlib.import_module('drtl_plugin.compat.basicsr').repair()
