"""Objects that hold tensors, arrays or networks are compared by identity: ``==`` of tensors is no truth value."""

import collections.abc
import dataclasses
import importlib
import pkgutil
import typing

import numpy as np
import pytest
import torch

import drtl_plugin
from drtl_plugin.relation.estimators import RelationEvidence
from drtl_plugin.relation.graph import KnowledgeGraph
from drtl_plugin.report.html import Comparison
from drtl_plugin.sources.alignment import Alignment


def holds_tensors(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, (torch.Tensor, np.ndarray, torch.nn.Module)):
        return True
    if typing.get_origin(hint) is collections.abc.Callable:
        return False
    return any(map(holds_tensors, typing.get_args(hint)))


def dataclasses_of_tensors() -> list[type]:
    names = [module.name for module in pkgutil.walk_packages(drtl_plugin.__path__, 'drtl_plugin.')]
    found = {}
    for module in map(importlib.import_module, names):
        for cls in vars(module).values():
            if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__:
                hints = typing.get_type_hints(cls)
                if any(holds_tensors(hints[field.name]) for field in dataclasses.fields(cls)):
                    found[cls.__qualname__] = cls
    return list(found.values())


def test_dataclasses_of_tensors_are_compared_by_identity():
    classes = dataclasses_of_tensors()
    assert {'KnowledgeGraph', 'CameraFit', 'TrainedNetwork', 'Alignment'} <= {cls.__name__ for cls in classes}
    assert not [cls.__name__ for cls in classes if cls.__eq__ is not object.__eq__]


@pytest.mark.parametrize(
    'make',
    [
        lambda: KnowledgeGraph(('a', 'b'), torch.eye(3)),
        lambda: RelationEvidence(*torch.rand(4, 2, 3)),
        lambda: Comparison('a', *np.zeros((3, 4, 4, 3), np.uint8)),
        lambda: Alignment(np.eye(2, 3), 1.0, 0.0),
    ],
)
def test_they_can_be_compared_and_counted(make):
    first, second = make(), make()
    assert first == first and first != second
    assert len({first, second, first}) == 2
