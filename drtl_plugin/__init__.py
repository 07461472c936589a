"""DRTL (Distortion-Relation guided Transfer Learning, arXiv 2111.13078) as a plug-in for BasicSR.

Importing this package is cheap. As soon as BasicSR is imported, whether before or after, it is repaired for current
versions of torch and Python (:mod:`drtl_plugin.compat`), and its registries receive our architectures, datasets,
losses, metrics and models::

    import drtl_plugin
    from basicsr.train import train_pipeline
"""

__version__ = '0.2.0'

import contextlib
import importlib
import importlib.abc
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

# Waiting OpenMP threads spin. If other processes need the cores, spinning threads block them: two runs on two cores
# were 45 times slower than one run alone, but only 3.5 times with a shorter spin. OpenMP reads this when torch loads.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '5000')

# The packages that register() imports, and what they import.
_ROOMS = (
    *('archs', 'data', 'hooks', 'losses', 'meta', 'metrics', 'models', 'options'),
    *('relation', 'report', 'runtime', 'tasks'),
)


def has_basicsr() -> bool:
    """Whether ``import basicsr`` finds the package: a checkout of BasicSR has no ``version.py`` until it is built."""
    spec = importlib.util.find_spec('basicsr')
    return spec is not None and spec.origin is not None and Path(spec.origin).with_name('version.py').is_file()


def register() -> None:
    """Add our classes to BasicSR's registries. Later calls do nothing."""
    for room in ('archs', 'data', 'losses', 'hooks', 'metrics', 'models'):
        importlib.import_module(f'drtl_plugin.{room}')
    for module in ('runtime.resume', 'compat.saving'):
        importlib.import_module(f'drtl_plugin.{module}').install()


@contextlib.contextmanager
def _repairing() -> Iterator[None]:
    with importlib.import_module('drtl_plugin.compat').preparing_import():
        yield
    _repair_and_register()


def _repair_and_register() -> None:
    importlib.import_module('drtl_plugin.compat').repair()
    if plug_in.registers:
        register()


class _Wrapping(importlib.abc.Loader):
    """Executes a module with its own loader, in a context.

    The loader itself is not changed, since many modules may share it.

    Args:
        loader: The module's own loader; all other attributes are looked up there.
        context (Callable): Makes the context.
    """

    def __init__(self, loader: Any, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._loader, self._context = loader, context

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        # Restore the module's own loader: importlib.resources chooses a reader by the loader's type.
        module.__spec__.loader = module.__loader__ = self._loader
        with self._context():
            self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class PlugIn(importlib.abc.MetaPathFinder):
    """Repairs BasicSR and calls :func:`register` when BasicSR is imported.

    Attributes:
        registers (bool): Whether to call :func:`register`. The ``basicsr`` command does so itself, where needed.
    """

    def __init__(self) -> None:
        self.registers = True
        self._local = threading.local()  # names: the modules that this thread is finding

    def find_spec(self, name, path=None, target=None):
        """Let the other finders find the module, and wrap its execution."""
        is_room = name.startswith('drtl_plugin.') and name.partition('.')[2] in _ROOMS
        names = self._local.__dict__.setdefault('names', set())
        if (name != 'basicsr' and not is_room) or name in names:
            return None
        names.add(name)
        try:
            # Not importlib.util.find_spec: for a module that is imported again, it returns the old specification.
            finders = [finder for finder in sys.meta_path if finder is not self]
            found = (finder.find_spec(name, path, target) for finder in finders)
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            names.remove(name)
        if spec is None or spec.loader is None:
            return spec
        if is_room:
            spec.loader = _Wrapping(spec.loader, self._with_basicsr)
        else:
            spec.loader = _Wrapping(spec.loader, _repairing)
        return spec

    @contextlib.contextmanager
    def _with_basicsr(self) -> Iterator[None]:
        # Otherwise, a half-initialised module could import BasicSR, and register() would import that module again.
        if self.registers:
            importlib.import_module('basicsr')
        yield


plug_in = PlugIn()
# Without BasicSR there are no registries, and drtl_plugin.install, which installs it, has to run.
if has_basicsr():
    sys.meta_path.insert(0, plug_in)
    if 'basicsr' in sys.modules:
        _repair_and_register()
