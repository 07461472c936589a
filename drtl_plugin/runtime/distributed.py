"""Training in several processes, with or without GPUs: agreement between them, and averaging of gradients.

The distortions of a step depend only on the step and its episodes, so N processes with B episodes each take the same
step as one process with N · B episodes, provided that N divides the number of episodes and the network has no dropout
and no running statistics. All processes need the same folders.
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

# Size of a gradient message in bytes.
_BUCKET = 25 * 1024**2


def end_dist() -> None:
    """Wait for the other processes, if there are any, and leave the group."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def abandon(code: int) -> None:
    """Exit at once if there are other processes, since waiting for each other could deadlock.

    The launcher then ends the others (torchrun does; srun with ``--kill-on-bad-exit=1``).
    """
    if distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def of_first_process(make: Callable[[], T]) -> T:
    """Call ``make`` in the first process and return its result in all processes; the others wait.

    Args:
        make (Callable[[], T]): Called in the first process only; its result must be picklable.

    Raises:
        DRTLError: In all processes, if ``make`` raises it.
        RuntimeError: In the other processes, if ``make`` raises anything else.
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
    """Whether ``here`` is true in any process; all of them must call this."""
    if get_dist_info()[1] == 1:
        return here
    # On the CPU, so that this does not wait for a GPU.
    answer = torch.tensor(int(here))
    distributed.all_reduce(answer, distributed.ReduceOp.MAX)
    return bool(answer)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy tensors from the first process to all others."""
    for tensor in tensors:
        distributed.broadcast(tensor, src=0)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over the processes, many parameters per message.

    ``mmengine.dist.all_reduce_params`` would copy gradients from a GPU to the host, since it supports only one backend.

    Args:
        parameters (Iterable[Tensor]): The same in all processes, with gradients for the same ones.
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
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
