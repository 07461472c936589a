"""Leaves out of an import what takes long and is seldom called."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def deferred(name: str, function: str) -> Iterator[None]:
    """Import a module when one of its functions is first called, not when the function is imported.

    Within the context, a proxy replaces the module. Access to any other attribute imports the module at once.

    Args:
        name (str): The module; if it is imported already, nothing happens.
        function (str): The function that is imported from it.
    """
    if name in sys.modules:
        yield
        return
    stand_in = types.ModuleType(name)

    def leave() -> None:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        leave()
        return getattr(importlib.import_module(name), function)(*args, **kwargs)

    def look_up(attribute: str) -> Any:
        if attribute.startswith('__'):  # asked by the import system
            raise AttributeError(attribute)
        leave()
        return getattr(importlib.import_module(name), attribute)

    stand_in.__dict__.update({function: call, '__getattr__': look_up})
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        leave()
