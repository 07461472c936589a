"""Seeing on a CPU what a GPU would be waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Watch(TorchDispatchMode):
    def __init__(self, fetched: list) -> None:
        super().__init__()
        self.fetched = fetched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.fetched.append(func)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watch_fetches() -> Iterator[list]:
    """A list of what has fetched values of tensors: numbers, lists, arrays, and indexing by a mask."""
    fetched: list = []
    with contextlib.ExitStack() as stack:
        for name in ('tolist', 'numpy', 'cpu'):
            method = getattr(torch.Tensor, name)

            def watched(tensor, *args, method=method, **kwargs):
                fetched.append(method)
                return method(tensor, *args, **kwargs)

            stack.enter_context(mock.patch.object(torch.Tensor, name, watched))
        stack.enter_context(_Watch(fetched))
        yield fetched
