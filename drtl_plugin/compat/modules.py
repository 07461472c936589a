"""Modules that BasicSR imports but newer versions of Python and SciPy no longer have."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

# Missing module: the name that BasicSR imports from it, and where that is now.
_MOVED = {
    'distutils.version': ('LooseVersion', 'packaging.version', 'Version'),
    'scipy.ndimage.filters': ('convolve', 'scipy.ndimage', 'convolve'),
}


def restore_modules() -> list[str]:
    """Restore the modules.

    Faults: ``basicsr/archs/arch_util.py`` compares versions with ``distutils.version.LooseVersion``, which Python 3.12
    removed (setuptools provides it only where installed and enabled); ``basicsr/metrics/niqe.py`` imports
    ``scipy.ndimage.filters``, which SciPy deprecated in 1.8 for removal in 2.0.

    Returns:
        list[str]: The modules that were missing.
    """
    restored = [name for name in _MOVED if not _exists(name)]
    for name in restored:
        for parent in (name.rpartition('.')[0], name):
            if not _exists(parent):
                sys.modules[parent] = types.ModuleType(parent)
                sys.modules[parent].__path__ = []
        attribute, module, replacement = _MOVED[name]
        setattr(sys.modules[name], attribute, getattr(importlib.import_module(module), replacement))
    return restored


def _exists(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent does not exist
        return False
