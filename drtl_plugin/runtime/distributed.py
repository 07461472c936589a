"""Training by several processes, with or without GPUs: starting them, agreeing, adding up gradients.

The distortions of a training step depend on its number and those of its episodes alone, so that N processes with B
episodes each take the step that one process takes with N · B: the same episodes where N divides their number, and the
same gradient where the network draws nothing by itself and keeps no running statistics. All processes see the same
folders.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import torch
from basicsr.utils.dist_util import get_dist_info
from torch import Tensor, distributed, multiprocessing

from drtl_plugin.errors import DRTLError, OptionError

T = TypeVar('T')

# Bytes of gradients that are sent at once.
_BUCKET = 25 * 1024**2
# The first process measures relations, adapts, validates and saves while the others wait.
_TIMEOUT = timedelta(hours=3)
_STARTED_BY = {
    'pytorch': ('torchrun', ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')),
    'slurm': ('srun', ('SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_NTASKS', 'SLURM_NODELIST')),
}


def init_dist(launcher: str, backend: str | None = None, port: int | None = None) -> None:
    """Join the other processes; in the place of BasicSR's function, which needs a GPU and gives SLURM's node list to a
    shell (CVE-2024-27763).

    Args:
        launcher (str): ``pytorch``: started by torchrun; ``slurm``: by srun.
        backend (str | None): Of torch.distributed. By default, and for ``nccl``, NCCL for tensors on GPUs and Gloo for
            others.
        port (int | None): Of the first process, for SLURM; by default ``MASTER_PORT``, or 29500.

    Raises:
        OptionError: If the process was not started so.
    """
    command, variables = _STARTED_BY[launcher]
    missing = [name for name in variables if name not in os.environ]
    if missing:
        raise OptionError(f'--launcher {launcher}: {", ".join(missing)} is not set; start the processes by {command}.')
    if launcher == 'slurm':
        os.environ.update(
            RANK=os.environ['SLURM_PROCID'],
            LOCAL_RANK=os.environ['SLURM_LOCALID'],
            WORLD_SIZE=os.environ['SLURM_NTASKS'],
            MASTER_ADDR=_first_host(os.environ['SLURM_NODELIST']),
            MASTER_PORT=str(port or os.environ.get('MASTER_PORT', 29500)),
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']) % torch.cuda.device_count())
    if backend in (None, 'nccl'):
        backend = 'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo'
    # Forked loaders and communication don't go together.
    multiprocessing.set_start_method('spawn', force=True)
    distributed.init_process_group(backend, timeout=_TIMEOUT)


def _first_host(node_list: str) -> str:
    command = ['scontrol', 'show', 'hostnames', node_list]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise OptionError(f'--launcher slurm: {" ".join(command)} names no host ({error}).') from None


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
