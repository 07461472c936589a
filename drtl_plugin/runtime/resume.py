"""Exact resumption: which state to resume from, and the samples and random numbers that come next."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import basicsr.train
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.utils import check_resume, set_random_seed
from torch.utils.data import Dataset

from drtl_plugin.errors import DataError
from drtl_plugin.runtime import checkpoints
from drtl_plugin.runtime.checkpoints import random_state, set_random_state
from drtl_plugin.runtime.distributed import of_first_process

# File in a run's folder that names the torchrun process which has started the run.
_LAUNCH = '.torchrun'


def load_resume_state(opt: dict) -> dict | None:
    """Find and load the training state to resume from.

    Unlike BasicSR's function of this name, it needs no GPU, and falls back to an older state if the newest is damaged.

    Args:
        opt (dict): Parsed options. ``opt['path']['resume_state']`` is set to the state found, and the
            ``pretrain_network_…`` and ``param_key_…`` of ``opt['path']`` to the networks that belong to it.

    Returns:
        dict | None: The state, on the CPU (BasicSR's optimizers move it to the parameters' device), or None.

    Raises:
        DataError: If the state cannot be read.
    """
    path = opt['path'].get('resume_state')
    if opt['auto_resume']:
        # Only some relations have a DRN.
        optional = ['network_r', *(opt['path'].get('ignore_resume_networks') or ())]
        if opt.get('network_d') is None:
            optional.append('network_d')
        labels = [key.replace('network', 'net') for key in opt if key.startswith('network_') and key not in optional]
        states, models = (Path(opt['path'][key]) for key in ('training_states', 'models'))
        found = checkpoints.newest_valid_state(states, models, labels)
        path, state = found or (None, None)
        opt['path']['resume_state'] = path and str(path)
    elif path is not None:
        state = checkpoints.read(path, 'path.resume_state')
    if path is None:
        return None
    if not isinstance(state, dict) or not {'iter', 'epoch', 'optimizers', 'schedulers'} <= set(state):
        raise DataError(f'path.resume_state: {path} is not a training state.')
    written = {key: value for key, value in opt['path'].items() if key.startswith('param_key_')}
    check_resume(opt, state['iter'])
    ignored = opt['path'].get('ignore_resume_networks') or ()
    for key, value in written.items():  # a training state's networks are under params
        opt['path'][key] = value if key.replace('param_key', 'network') in ignored else 'params'
    for key, network in opt['path'].items():
        if key.startswith('pretrain_network_') and network and Path(network).exists():
            checkpoints.read(network, f'path.{key}')
    return state


def record_launch(opt: dict) -> None:
    """Record in the run's folder which torchrun process has started the run, if one has."""
    if 'TORCHELASTIC_RUN_ID' in os.environ and opt['rank'] == 0:
        Path(opt['path']['experiments_root'], _LAUNCH).write_text(_launch(), encoding='utf-8')


def continue_if_restarted(opt: dict) -> bool:
    """Go on with a run that torchrun has restarted (``--max-restarts``) after one of its processes failed.

    Args:
        opt (dict): Parsed options. ``auto_resume`` is set if the run has saved a training state, unless
            ``path.resume_state`` names one: then the run starts from that one again.

    Returns:
        bool: Whether this run was restarted; the folder of its name is its own then. The same in all processes.
    """
    if int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) == 0:
        return False

    def restarted() -> bool:
        record = Path(opt['path']['experiments_root'], _LAUNCH)
        # Otherwise, it failed before it had a folder; the folder of its name is that of an older run.
        return record.is_file() and record.read_text(encoding='utf-8') == _launch()

    if not of_first_process(restarted):
        return False
    if not opt['path'].get('resume_state'):
        opt['auto_resume'] = True
    return True


def _launch() -> str:
    return f'{os.environ["TORCHELASTIC_RUN_ID"]}, process {os.getppid()} of {socket.gethostname()}'


def install() -> bool:
    """Let BasicSR's own ``train_pipeline`` resume through :func:`load_resume_state`.

    Fault: its function asks CUDA for the current device even if there is none.

    Returns:
        bool: Whether it was not installed before.
    """
    if basicsr.train.load_resume_state is load_resume_state:
        return False
    basicsr.train.load_resume_state = load_resume_state
    return True


class ResumingSampler(EnlargedSampler):
    """``EnlargedSampler`` that, in the interrupted epoch, skips the samples seen before.

    At the start of that epoch, it also restores the shared random generators: not earlier, since creating the loader's
    iterator draws from them. Processes other than the first, whose generators the state does not hold, are reseeded.

    Args:
        dataset (Dataset): To sample from.
        opt (dict): Parsed options.
        resume_state (dict | None): The training state to resume from.

    Attributes:
        batch_size (int): Samples that a process loads for a step.
        steps (int): Steps of an epoch; an incomplete batch at its end is dropped.
    """

    def __init__(self, dataset: Dataset, opt: dict, resume_state: dict | None) -> None:
        dataset_opt = opt['datasets']['train']
        super().__init__(dataset, opt['world_size'], opt['rank'], dataset_opt.get('dataset_enlarge_ratio', 1))
        # As in build_dataloader.
        self.batch_size = dataset_opt['batch_size_per_gpu'] * (1 if opt['dist'] else max(opt['num_gpu'], 1))
        self.steps = self.num_samples // self.batch_size
        self._opt, self._state = opt, resume_state

    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        state = self._state
        if state is None or self.epoch != state['epoch']:
            return iter(indices)
        if self.rank:
            set_random_seed((self._opt['manual_seed'] + self.rank + 1000 * state['iter']) % 2**32)
        elif 'random' in state:
            set_random_state(state['random'])
        seen = max(0, state['iter'] - self.epoch * self.steps)
        return iter(indices[seen * self.batch_size :])


@contextlib.contextmanager
def restoring_random_state() -> Iterator[None]:
    """Restore the shared random generators after a block, e.g. a validation, which resuming may repeat."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
