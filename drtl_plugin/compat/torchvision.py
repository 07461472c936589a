"""Fixes for torchvision: builds that do not match torch, and a module that BasicSR expects but newer versions lack."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import torch

from drtl_plugin.compat.deferred import deferred

# Operators for which torchvision registers fake kernels while it is imported: nms (since about 0.17), qnms (0.28).
_SCHEMAS = {
    'nms': 'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms': 'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
}
# Keeps the definitions alive: torch drops a library's operators when the object is collected.
_libraries: list[torch.library.Library] = []


def define_missing_operators() -> bool:
    """Make ``import torchvision`` succeed where its compiled operators cannot be loaded.

    Fault: torchvision registers fake kernels for its operators at import, but defines the operators only when its
    shared library loads, which fails with a CPU build of torch, for example. The import fails with "operator
    torchvision::nms does not exist". BasicSR calls none of these operators, so defining their schemas is enough.

    Returns:
        bool: Whether a repair was needed.

    Raises:
        RuntimeError: If torchvision still cannot be imported; names both versions.
    """
    try:
        _import_torchvision()
        return False
    except RuntimeError as error:
        if 'operator torchvision::' not in str(error):
            raise
    _forget_torchvision()
    library = torch.library.Library('torchvision', 'FRAGMENT')
    _libraries.append(library)
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    try:
        _import_torchvision()
    except RuntimeError as error:
        raise RuntimeError(
            f'torchvision cannot be imported with torch {torch.__version__} ({error}): '
            'install the torchvision release that belongs to this torch.'
        ) from error
    return True


def _import_torchvision() -> None:
    """Import torchvision without torch's compiler.

    Fault: torchvision 0.28 imports ``torch._dynamo``, which takes as long as the rest of torchvision, for a function
    that only ``roi_align`` calls.
    """
    with deferred('torch._dynamo.utils', 'is_compile_supported'):
        importlib.import_module('torchvision')


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.partition('.')[0] == 'torchvision']:
        del sys.modules[name]


def restore_functional_tensor() -> bool:
    """Restore the module ``torchvision.transforms.functional_tensor``.

    Fault: ``basicsr/data/degradations.py`` imports ``rgb_to_grayscale`` from it; torchvision removed it in 0.17.

    Returns:
        bool: Whether a repair was needed.
    """
    name = 'torchvision.transforms.functional_tensor'
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return False
    functional = importlib.import_module('torchvision.transforms.functional')
    module: Any = types.ModuleType(name)
    module.rgb_to_grayscale = functional.rgb_to_grayscale
    sys.modules[name] = module
    return True
