"""Runs in processes of their own, to be killed and told to stop."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from drtl_plugin import cli

# Draws from all generators that hooks and networks may draw from, and lets the weights depend on them.
DICE_HOOK = """
import random
import numpy as np
import torch
from drtl_plugin.hooks import META_HOOK_REGISTRY, MetaTrainerHook

@META_HOOK_REGISTRY.register()
class DiceHook(MetaTrainerHook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        with torch.no_grad():
            for parameter in runner.net_g.parameters():
                parameter.add_(1e-4 * noise)
"""
_PROCESSES = multiprocessing.get_context('forkserver')
_PROCESSES.set_forkserver_preload(['drtl_plugin.commands.runs', 'drtl_plugin.runtime.loop'])


def _train(folder: str, path: str) -> None:
    os.setsid()
    # Loaders are started as in a run from the command line, not by this server.
    multiprocessing.set_start_method('fork', force=True)
    os.chdir(folder)
    sys.stdout = sys.stderr = open('output.txt', 'a')  # noqa: SIM115
    torch.set_num_threads(1)
    sys.exit(cli.main(['train', '-opt', path, '--auto_resume', '--import', 'dice']))


def start(workdir: Path, path: str) -> multiprocessing.Process:
    process = _PROCESSES.Process(target=_train, args=(str(workdir), path))
    process.start()
    return process


def wait_for(process: multiprocessing.Process, root: Path, pattern: str, text: str = '') -> None:
    """Wait until there is a file with a text, or the process has ended."""
    while process.is_alive() and not any(text in path.read_text(errors='ignore') for path in root.glob(pattern)):
        time.sleep(0.01)


def wait_for_the_end_of(process: multiprocessing.Process) -> None:
    """Wait until nothing that a process has started is left."""
    for _ in range(200):
        if subprocess.run(['pgrep', '--session', str(process.pid)], capture_output=True).returncode == 1:
            return
        time.sleep(0.1)
    raise AssertionError('processes are left over')


@pytest.fixture
def long_opt(workdir, quick_opt) -> dict:
    """Everything that a state has to hold, saved after every iteration and validated after every other."""
    (workdir / 'dice.py').write_text(DICE_HOOK)
    quick_opt['train']['total_iter'] = 24
    quick_opt['train']['scheduler'] = {'type': 'CosineAnnealingRestartLR', 'periods': [24], 'eta_min': 1e-7}
    quick_opt['drtl']['inner'] = {'rate_lr': 1e-3}
    quick_opt['drtl']['weighting']['mode'] = 'sampling'
    quick_opt['drtl']['hooks'] += [{'type': 'DiceHook'}]
    quick_opt['drtl']['hooks'][0]['interval'] = 4
    quick_opt['datasets']['train'].update(num_worker_per_gpu=1, num_episodes=10)  # several epochs
    quick_opt['datasets']['val']['meta_info_file'] = str(workdir / 'val.txt')
    (workdir / 'val.txt').write_text('coffee.png\n')
    quick_opt['val']['val_freq'] = 2
    quick_opt['logger'].update(save_checkpoint_freq=1, keep_checkpoints=3, use_tb_logger=False)
    return quick_opt


def equal(first, second) -> bool:
    """Whether two contents of files are the same, tensors bit for bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return first == second


def assert_same_run(first: Path, second: Path) -> None:
    files = sorted(path.relative_to(first) for path in first.glob('*/*') if path.suffix in ('.pth', '.state'))
    assert files == sorted(path.relative_to(second) for path in second.glob('*/*') if path.suffix in ('.pth', '.state'))
    assert {'net_g_latest.pth', 'net_g_adapted_latest.pth', 'net_r_latest.pth', '24.state'} <= {p.name for p in files}
    for name in files:
        contents = [torch.load(folder / name, weights_only=True) for folder in (first, second)]
        assert equal(*contents), name
    for name in ('weights.csv', 'metrics.csv', 'knowledge_graph.json'):
        assert (first / name).read_text() == (second / name).read_text()


def kill_now_and_then(workdir: Path, opt: dict, times: int, rng: random.Random) -> None:
    """Run to the end, killed on the way at random moments; most of its time such a run is saving."""
    path = workdir / 'killed.yml'
    path.write_text(yaml.safe_dump({**opt, 'name': 'killed'}))
    root = workdir / 'experiments/killed'
    exit_codes = []
    for _ in range(times):
        done = max((int(state.stem) for state in root.glob('training_states/*.state')), default=0)
        process = start(workdir, str(path))
        # At least one iteration each, so that there is an end.
        wait_for(process, root, f'training_states/{done + 1}.state')
        time.sleep(rng.uniform(0, 3 / times))
        process.kill()
        process.join()
        exit_codes.append(process.exitcode)
    assert set(exit_codes) <= {-signal.SIGKILL, 0}, (workdir / 'output.txt').read_text()
    assert exit_codes[0] == -signal.SIGKILL
    wait_for_the_end_of(process)
    process = start(workdir, str(path))
    process.join()
    assert process.exitcode == 0, (workdir / 'output.txt').read_text()
