"""Training by several processes, with or without GPUs: agreeing, and adding up gradients.

The distortions of a training step depend on its number and those of its episodes alone, so that N processes with B
episodes each take the step that one process takes with N · B: the same episodes where N divides their number, and the
same gradient where the network draws nothing by itself and keeps no running statistics. All processes see the same
folders.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from basicsr.utils.dist_util import get_dist_info
from torch import Tensor, distributed

from drtl_plugin.errors import DRTLError

T = TypeVar('T')

# Bytes of gradients that are sent at once.
_BUCKET = 25 * 1024**2


def end_dist() -> None:
    """Wait for the other processes, if there are any, and leave them."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def abandon(code: int) -> None:
    """Where there are other processes, end this one at once; they may be waiting for it, and it for them.

    The launcher then ends the others (torchrun does; srun with ``--kill-on-bad-exit=1``).
    """
    if distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def of_first_process(make: Callable[[], T]) -> T:
    """What ``make`` returns in the first process, in all of them; the others wait.

    Args:
        make (Callable[[], T]): Called in the first process only; what it returns is pickled.

    Raises:
        DRTLError: Where ``make`` raises it, in all processes.
        RuntimeError: In the others, where it raises anything else.
    """
    rank, world_size = get_dist_info()
    if world_size == 1:
        return make()
    answer: list = [None, None]
    if rank == 0:
        try:
            answer[0] = make()
        except DRTLError as error:
            answer[1] = error
        except Exception as error:
            distributed.broadcast_object_list([None, RuntimeError(f'the first process failed: {error}')], src=0)
            raise
    distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def any_process(here: bool) -> bool:
    """Whether something is so in any of the processes; all of them must ask."""
    if get_dist_info()[1] == 1:
        return here
    # On the CPU: waiting for the answer must not be waiting for a GPU.
    answer = torch.tensor(int(here))
    distributed.all_reduce(answer, distributed.ReduceOp.MAX)
    return bool(answer)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Set tensors to what they are in the first process."""
    for tensor in tensors:
        distributed.broadcast(tensor, src=0)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Set gradients to their mean over the processes, in buckets: one message for many parameters.

    (``mmengine.dist.all_reduce_params`` would take those of a GPU through the host's memory: it knows of one backend.)

    Args:
        parameters (Iterable[Tensor]): The same in all processes, as are those that have no gradient.
    """
    world_size = get_dist_info()[1]
    if world_size == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if bucket and (size >= _BUCKET or parameter.grad.dtype != bucket[0].dtype):
            _average(bucket, world_size)
            bucket, size = [], 0
        bucket.append(parameter.grad)
        size += parameter.grad.nbytes
    if bucket:
        _average(bucket, world_size)


def _average(tensors: list[Tensor], world_size: int) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= world_size
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))
