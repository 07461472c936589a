"""Replaces BasicSR's ``init_dist``, which needs a GPU and passes SLURM's node list to a shell (CVE-2024-27763).

Fault of torch 2.13, too: processes restarted by ``torchrun --max-restarts`` find the addresses of those that failed in
the store which torchrun keeps, and wait for them forever (Gloo).
"""

from __future__ import annotations

import os
import subprocess
from datetime import timedelta

import torch
from torch import distributed, multiprocessing

from drtl_plugin.errors import OptionError

# The others wait while the first process measures relations, adapts, validates and saves.
_TIMEOUT = timedelta(hours=3)
_STARTED_BY = {
    'pytorch': ('torchrun', ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')),
    'slurm': ('srun', ('SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_NTASKS', 'SLURM_NODELIST')),
}


def init_dist(launcher: str, backend: str | None = None, port: int | None = None) -> None:
    """Join the other processes of a run.

    Args:
        launcher (str): ``pytorch`` for processes started by torchrun, ``slurm`` for those started by srun.
        backend (str | None): torch.distributed backend. None and ``nccl`` use NCCL for tensors on GPUs and Gloo for
            others.
        port (int | None): Port of the first process, for SLURM. Default: ``MASTER_PORT``, or 29500.

    Raises:
        OptionError: If the process was started in some other way.
    """
    command, variables = _STARTED_BY[launcher]
    missing = [name for name in variables if name not in os.environ]
    if missing:
        raise OptionError(
            f'--launcher {launcher}: {", ".join(missing)} is not set; start the processes with {command}.'
        )
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
    # Forked loader processes can't communicate.
    multiprocessing.set_start_method('spawn', force=True)
    restarts = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
    if not restarts:
        distributed.init_process_group(backend, timeout=_TIMEOUT)
        return
    store, rank, world_size = next(distributed.rendezvous('env://', timeout=_TIMEOUT))
    store = distributed.PrefixStore(f'restart {restarts}', store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)


def _first_host(node_list: str) -> str:
    command = ['scontrol', 'show', 'hostnames', node_list]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise OptionError(f'--launcher slurm: {" ".join(command)} names no host ({error}).') from None
