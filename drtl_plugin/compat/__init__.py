"""Repairs of BasicSR 1.4.2 for current torch, torchvision, SciPy, Python, and for machines without a GPU.

Each repair names the fault it answers and leaves a healthy installation alone.
"""

from __future__ import annotations

import importlib


def prepare_import() -> None:
    """Apply the repairs without which ``import basicsr`` fails. May be called again."""
    torchvision = importlib.import_module('drtl_plugin.compat.torchvision')
    torchvision.define_missing_operators()
    torchvision.restore_functional_tensor()
    importlib.import_module('drtl_plugin.compat.modules').restore_modules()


def repair() -> None:
    """Apply all repairs; ``import basicsr`` succeeds afterwards. May be called again."""
    prepare_import()
    importlib.import_module('drtl_plugin.compat.lmdb').share_environments()
    importlib.import_module('drtl_plugin.compat.basicsr').repair()
