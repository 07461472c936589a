"""Steps that tests of models have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import default_collate

from drtl_plugin.models import DRTLModel


def skip_start(model: DRTLModel) -> None:
    """Have the model start without the hooks' ``before_train``, so that no relation is measured."""
    model.prepare()
    model._started = True


def batch_of(model: DRTLModel, num: int) -> dict[str, Any]:
    """The first episodes of the model's training set, as a loader batches them."""
    return default_collate([model.train_set[i] for i in range(num)])


def feed(model: DRTLModel, tasks: Sequence[int]) -> None:
    """Feed as many episodes as there are tasks; they have these tasks instead of drawn ones."""
    model.start()
    drawn = iter(tasks)
    with mock.patch.object(model.episodes, 'draw_task', lambda *_: next(drawn)):
        model.feed_data(batch_of(model, len(tasks)))


def parameters(net: nn.Module) -> torch.Tensor:
    """All weights as one vector."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])
