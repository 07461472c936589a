"""Runs that are killed, told to stop, or started twice."""

import contextlib
import errno
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import basicsr.train
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from drtl_plugin import cli
from drtl_plugin.errors import DataError
from drtl_plugin.relation import estimators
from drtl_plugin.runtime import progress
from drtl_plugin.runtime.loop import Interrupted, TrainingRun, exclusive

# Draws from all generators that hooks and networks may draw from, and lets the weights depend on them.
_DICE_HOOK = """
import random
import numpy as np
import torch
from drtl_plugin.meta import META_HOOK_REGISTRY, MetaTrainerHook

@META_HOOK_REGISTRY.register()
class DiceHook(MetaTrainerHook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        with torch.no_grad():
            for parameter in runner.net_g.parameters():
                parameter.add_(1e-4 * noise)
"""
_PROCESSES = multiprocessing.get_context('forkserver')
_PROCESSES.set_forkserver_preload(['drtl_plugin.cli'])


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
    (workdir / 'dice.py').write_text(_DICE_HOOK)
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


@pytest.mark.parametrize('times', [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(workdir, long_opt, times):
    path = workdir / 'whole.yml'
    path.write_text(yaml.safe_dump({**long_opt, 'name': 'whole'}))
    process = start(workdir, str(path))
    process.join()
    assert process.exitcode == 0
    kill_now_and_then(workdir, long_opt, times, random.Random(times))
    assert_same_run(workdir / 'experiments/whole', workdir / 'experiments/killed')
    state = torch.load(workdir / 'experiments/whole/training_states/24.state', weights_only=True)
    assert state['best_metric_results']['sample_camera_adapted']['psnr_y']['val'] > 5
    assert len(list((workdir / 'experiments/whole/training_states').glob('*.state'))) in (3, 4, 5)


def test_a_state_that_a_gpu_saved_resumes_on_the_cpu(workdir, quick_opt, write_opt, monkeypatch):
    """As older versions saved it, too: with the state of a CUDA generator, of 16 bytes; a CPU's has 5056."""
    quick_opt['train']['total_iter'] = 4
    quick_opt['logger']['save_checkpoint_freq'] = 2
    path = write_opt(quick_opt)
    assert cli.main(['train', '-opt', path]) == 0
    root = workdir / 'experiments/drtl_x4'
    whole = {name: torch.load(root / name, weights_only=True) for name in ('models/net_g_4.pth', 'models/net_r_4.pth')}
    for file in [*root.glob('*/*_4.pth'), root / 'training_states/4.state']:
        file.unlink()
    state = torch.load(root / 'training_states/2.state', weights_only=True)
    cuda_state = torch.zeros(16, dtype=torch.uint8)
    state.update(generator=cuda_state, patch_generator=torch.Generator().get_state())
    state['random']['cuda'] = [cuda_state]
    with monkeypatch.context() as patch:
        patch.setattr('torch.serialization.location_tag', lambda storage: 'cuda:0')
        torch.save(state, root / 'training_states/2.state')
    monkeypatch.chdir(workdir)
    assert cli.main(['train', '-opt', path, '--auto_resume']) == 0
    assert all(equal(torch.load(root / name, weights_only=True), content) for name, content in whole.items())


def test_an_error_leaves_no_loader_behind(workdir, long_opt):
    (workdir / 'dice.py').write_text(_DICE_HOOK.replace('noise = ', 'noise = batch_idx // 0 + '))
    path = workdir / 'failing.yml'
    path.write_text(yaml.safe_dump(long_opt))
    process = start(workdir, str(path))
    process.join(60)
    assert process.exitcode == 1, (workdir / 'output.txt').read_text()
    wait_for_the_end_of(process)


# A process that has a pool of its own beside a run, as a notebook may; a pool whose worker was killed never ends.
_NOTEBOOK = """
import multiprocessing, os, sys
from drtl_plugin import cli

try:
    pool = multiprocessing.get_context('fork').Pool(1)
    worker = pool.apply(os.getpid)
    try:
        print('code', cli.main(sys.argv[1:]))
    except ZeroDivisionError:
        print('failed')
    print('only the pool is left:', [process.pid for process in multiprocessing.active_children()] == [worker])
    print('the pool works:', pool.apply_async(os.getpid).get(timeout=10) == worker)
finally:
    for process in multiprocessing.active_children():
        process.kill()
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.parametrize('fails', [False, True])
@pytest.mark.parametrize('prefetch_mode', [None, 'cpu'])
def test_a_run_ends_its_own_loaders_and_no_other_process(workdir, quick_opt, write_opt, fails, prefetch_mode):
    quick_opt['datasets']['train'].update(num_worker_per_gpu=1, prefetch_mode=prefetch_mode)
    quick_opt['val'] = None
    if fails:
        quick_opt['drtl']['hooks'].append({'type': 'DiceHook'})
    (workdir / 'dice.py').write_text(_DICE_HOOK.replace('noise = ', 'noise = batch_idx // 0 + '))
    command = [sys.executable, '-c', _NOTEBOOK, 'train', '-opt', write_opt(quick_opt), '--import', 'dice']
    output = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout.strip().splitlines()
    assert output[-3:] == ['failed' if fails else 'code 0', 'only the pool is left: True', 'the pool works: True']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_in_order(workdir, long_opt, number):
    long_opt['logger']['save_checkpoint_freq'] = 1000
    long_opt['train'].update(total_iter=1000, scheduler={'type': 'MultiStepLR', 'milestones': [100]})
    long_opt['val'] = None
    long_opt['drtl']['adapt']['steps'] = 10**6  # nobody waits for that
    path = workdir / 'stopped.yml'
    path.write_text(yaml.safe_dump({**long_opt, 'name': 'stopped'}))
    process = start(workdir, str(path))
    root = workdir / 'experiments/stopped'
    wait_for(process, root, '*.log', 'iter:       3')
    os.killpg(process.pid, number)  # as terminals and schedulers do
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        time.sleep(0.05)
        os.killpg(process.pid, number)  # and launchers once more
    process.join(60)
    assert process.exitcode == 128 + number, (workdir / 'output.txt').read_text()
    (state,) = root.glob('training_states/*.state')
    assert not list((root / 'models').glob('net_g_adapted*'))  # no time for it
    content = torch.load(state, weights_only=True)
    assert content['iter'] == int(state.stem) >= 3
    long_opt['drtl']['adapt']['steps'] = 2
    long_opt['train']['total_iter'] = int(state.stem) + 2
    path.write_text(yaml.safe_dump({**long_opt, 'name': 'stopped'}))
    process = start(workdir, str(path))
    process.join()
    assert process.exitcode == 0
    assert f'iter: {content["iter"]}.' in sorted(root.glob('*.log'))[-1].read_text()


@pytest.mark.parametrize('prefetch_mode', [None, 'cpu'])
def test_an_image_that_a_loader_cannot_read_ends_the_run(workdir, quick_opt, write_opt, capsys, prefetch_mode):
    """Rather than let it wait for the next batch forever."""
    folder = workdir / 'auxiliary'
    folder.mkdir()
    image = next((workdir / 'datasets/drtl_sample/auxiliary').iterdir())
    for number in range(70):  # more than those whose headers are read before training
        (folder / f'{number:02}{image.suffix}').symlink_to(image)
    damaged = folder / f'69{image.suffix}'
    damaged.unlink()
    damaged.write_bytes(b'damaged')
    quick_opt['datasets']['train'].update(
        dataroot_gt=str(folder), num_worker_per_gpu=1, prefetch_mode=prefetch_mode, batch_size_per_gpu=8
    )
    quick_opt['drtl']['weighting']['relation'] = 'uniform'
    quick_opt['train']['total_iter'] = 100
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith('basicsr: error: '))
    assert f'{damaged} of' in line


def test_prefetched_data_does_not_keep_a_run_from_ending(workdir, long_opt):
    long_opt['train']['total_iter'] = 2
    long_opt['datasets']['train']['prefetch_mode'] = 'cpu'
    path = workdir / 'prefetched.yml'
    path.write_text(yaml.safe_dump(long_opt))
    process = start(workdir, str(path))
    process.join(60)
    assert process.exitcode == 0, (workdir / 'output.txt').read_text()
    wait_for_the_end_of(process)


# Ten steps an epoch. In the end, BasicSR saves and validates once more, or saves only.
@pytest.mark.parametrize(
    'when, validated', [('iter:       2', 2), ('Save the latest', 1000), ('Save the latest', None)]
)
def test_a_signal_does_not_wait_for_adaptation(workdir, long_opt, when, validated):
    long_opt['logger']['save_checkpoint_freq'] = 1000
    long_opt['train']['total_iter'] = last = 2 if validated == 2 else 5
    long_opt['drtl']['adapt']['steps'] = 10**6
    if validated is None:
        long_opt['val'] = None
    else:
        long_opt['val']['val_freq'] = validated
    path = workdir / 'stopped.yml'
    path.write_text(yaml.safe_dump({**long_opt, 'name': 'stopped'}))
    process = start(workdir, str(path))
    root = workdir / 'experiments/stopped'
    wait_for(process, root, '*.log', when)
    time.sleep(1)
    process.terminate()
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM, (workdir / 'output.txt').read_text()
    (state,) = root.glob('training_states/*')
    assert state.name == f'{last}.state'
    assert torch.load(state, weights_only=True)['epoch'] == 0
    assert not list(root.glob('models/net_g_adapted*'))


def test_a_signal_is_obeyed_where_nobody_reads_the_line(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, 'stderr', Gone())
    with pytest.raises(Interrupted) as exit_info, TrainingRun({'name': 'x'}):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert exit_info.value.code == 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_full_disk_ends_a_run_with_its_checkpoints_whole(workdir, quick_opt, write_opt, capsys, monkeypatch):
    quick_opt['train']['total_iter'] = 4
    quick_opt['logger']['save_checkpoint_freq'] = 1
    save = torch.save

    def until_full(content, file):
        if isinstance(content, dict) and content.get('iter') == 3:
            file.write(b'as much as there was room for')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file)

    monkeypatch.setattr(torch, 'save', until_full)
    path = write_opt(quick_opt)
    assert cli.main(['train', '-opt', path]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert '3.state: cannot be written (No space left on device)' in error
    states = workdir / 'experiments/drtl_x4/training_states'
    assert sorted(state.name for state in states.iterdir()) == ['1.state', '2.state']
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    assert cli.main(['train', '-opt', path, '--auto_resume']) == 0
    assert sorted(state.name for state in states.iterdir()) == [f'{i}.state' for i in range(1, 5)]


def test_the_second_run_of_a_name_is_turned_away(workdir, quick_opt, write_opt, capsys):
    path = write_opt(quick_opt)
    script = 'import sys; from drtl_plugin.runtime.loop import exclusive\nwith exclusive("experiments", "drtl_x4"):\n'
    script += '    print("mine", flush=True); sys.stdin.read()'
    with subprocess.Popen([sys.executable, '-c', script], stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == b'mine\n'
        assert cli.main(['train', '-opt', path]) == 2
        error = capsys.readouterr().err
        assert f'experiments/drtl_x4: another run of this name (process {other.pid} of ' in error
        assert error.strip().count('\n') == 0
        assert not (workdir / 'experiments/drtl_x4').exists()
        other.kill()
    assert cli.main(['train', '-opt', path]) == 0


def test_a_name_is_given_once_in_a_process_and_given_back(workdir):
    owner = rf'process {os.getpid()} of {re.escape(socket.gethostname())}'
    with (
        exclusive('experiments', 'x'),
        exclusive('experiments', 'y'),
        pytest.raises(DataError, match=rf'experiments/x: another run of this name \({owner}\) is at work'),
        exclusive('experiments', 'x'),
    ):
        pass
    with pytest.raises(KeyError), exclusive('experiments', 'x'):
        raise KeyError
    with exclusive('experiments', 'x'):
        pass


def test_a_loader_that_outlives_a_killed_run_does_not_keep_its_name(workdir):
    script = 'import os, time; from drtl_plugin.runtime.loop import exclusive\nwith exclusive("experiments", "x"):\n'
    script += '    child = os.fork()\n    if child: print(child, flush=True)\n    time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', script], stdout=-1) as run:
        child = int(run.stdout.readline())
        run.kill()
        run.wait()
        with exclusive('experiments', 'x'):
            os.kill(child, signal.SIGKILL)  # fails if it has ended already


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_will_do(workdir, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr('fcntl.flock', flock)
    with exclusive('experiments', 'x'):
        assert Path('experiments').is_dir()
    with exclusive('experiments', 'x'):  # nothing of the first is left that would count as a lock
        pass


def test_a_folder_that_cannot_be_written_is_named(workdir):
    (workdir / 'experiments').write_text('a file')
    with (
        pytest.raises(DataError, match=r'experiments: cannot be written \(File exists\)'),
        exclusive('experiments', 'x'),
    ):
        pass


class TestResumingWithinAnEpoch:
    SIZE, BATCH = 10, 3  # three steps an epoch, a sample left over

    def samples(self, state) -> list[int]:
        """What a run trains on from a state to the end of the second epoch."""
        opt = {'dist': False, 'num_gpu': 0, 'datasets': {'train': {'batch_size_per_gpu': self.BATCH}}}
        with TrainingRun(opt):
            basicsr.train.load_resume_state(opt)
            sampler = basicsr.train.EnlargedSampler(range(self.SIZE), 1, 0)
            loader = DataLoader(range(self.SIZE), batch_size=self.BATCH, sampler=sampler, drop_last=True)
            seen = []
            for epoch in range(state['epoch'] if state else 0, 2):
                sampler.set_epoch(epoch)
                seen += [batch.tolist() for batch in loader]
        return seen

    @pytest.mark.parametrize('iteration', range(6))
    def test_goes_on_where_the_run_was_interrupted(self, monkeypatch, iteration):
        monkeypatch.setattr('basicsr.train.load_resume_state', lambda opt: None)
        whole = self.samples(None)
        assert len(whole) == 6
        state = {'epoch': max(iteration - 1, 0) // 3, 'iter': iteration}
        monkeypatch.setattr('basicsr.train.load_resume_state', lambda opt: state)
        assert self.samples(state) == whole[iteration:]


class TestNumbersGoneBad:
    HOOK = """
import torch
from drtl_plugin.meta import META_HOOK_REGISTRY, MetaTrainerHook

@META_HOOK_REGISTRY.register()
class SpoilHook(MetaTrainerHook):
    priority = 'HIGHEST'

    def __init__(self, iterations: list):
        self.iterations = iterations

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx + 1 in self.iterations:
            runner.episode_lq[0, 0] = float('nan')
"""

    @pytest.fixture
    def spoilt_opt(self, workdir, quick_opt) -> dict:
        (workdir / 'spoil.py').write_text(self.HOOK)
        quick_opt['train']['total_iter'] = 4
        quick_opt['logger']['save_checkpoint_freq'] = 1
        quick_opt['drtl']['hooks'].append({'type': 'SpoilHook', 'iterations': [2, 3]})
        return quick_opt

    @pytest.mark.parametrize('pipeline', ['meta', 'pretrain'])
    def test_steps_are_left_out_and_counted(self, workdir, spoilt_opt, write_opt, pipeline):
        spoilt_opt['drtl']['pipeline'] = pipeline
        assert cli.main(['train', '-opt', write_opt(spoilt_opt), '--import', 'spoil']) == 0
        root = workdir / 'experiments/drtl_x4'
        params = [torch.load(root / f'models/net_g_{i}.pth', weights_only=True) for i in range(1, 5)]
        assert equal(params[0], params[1]) and equal(params[1], params[2])
        assert not equal(params[2], params[3])
        states = [torch.load(root / f'training_states/{i}.state', weights_only=True) for i in (1, 3)]
        assert equal(states[0]['optimizers'], states[1]['optimizers'])
        log = next(root.glob('*.log')).read_text()
        assert 'iteration 3: the loss or the gradient is not finite (learning rate 0.001; tasks ' in log
        assert 'skipped_steps: 2.0000e+00' in log

    def test_too_many_end_the_run(self, workdir, spoilt_opt, write_opt, capsys):
        spoilt_opt['drtl']['hooks'].append({'type': 'NanGuardHook', 'max_skips': 1})
        assert cli.main(['train', '-opt', write_opt(spoilt_opt), '--import', 'spoil']) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(
            'basicsr: error: iteration 3: the loss or the gradient is not finite (learning rate 0.001'
        )
        assert '2 steps were left out, and max_skips of NanGuardHook is 1' in error
        models = workdir / 'experiments/drtl_x4/models'
        last = torch.load(models / 'net_g_2.pth', weights_only=True)['params']
        assert all(weight.isfinite().all() for weight in last.values())
        assert not (models / 'net_g_3.pth').exists()


class TestWhatTheLogSays:
    def test_steps_are_timed_without_what_is_done_beside_them(self, workdir, quick_opt, write_opt, monkeypatch):
        measure = estimators.ESTIMATOR_REGISTRY.get('embedding')

        def measure_slowly(question):
            time.sleep(3)
            return measure(question)

        monkeypatch.setitem(estimators.ESTIMATOR_REGISTRY._obj_map, 'embedding', measure_slowly)
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        log = next((workdir / 'experiments/drtl_x4').glob('*.log')).read_text()
        # Measured before the first and in the second iteration.
        times = [float(seconds) for seconds in re.findall(r'time \(data\): ([\d.]+)', log)]
        assert len(times) == 2 and max(times) < 2
        assert log.count('Measuring the relation to the target (embedding).\n') == 2
        assert len(re.findall(r'Measuring the relation to the target \(embedding\) took [3-9]\.\d s\.', log)) == 2

    @pytest.mark.parametrize(
        ('iteration', 'eta'), [(1, '1:06:40'), (600, '0:13:20'), (799, '0:00:04'), (800, '0:00:00')]
    )
    def test_eta_is_the_time_of_the_steps_that_are_left(self, caplog, monkeypatch, iteration, eta):
        opt = {'name': 'x', 'logger': {'print_freq': 1, 'use_tb_logger': False}, 'train': {'total_iter': 1001}}
        opt['train']['total_iter'] = 1001 if iteration == 1 else 800
        with TrainingRun(opt):
            logger = basicsr.train.MessageLogger(opt, 0, None)
        logger.start_time -= 10_000  # hours of validation
        monkeypatch.setattr(logger.logger, 'propagate', True)
        caplog.set_level('INFO', 'basicsr')
        log = {'epoch': 0, 'iter': iteration, 'lrs': [1e-3], 'time': 4.0, 'data_time': 0.1}
        logger(log)
        assert f'[eta: {eta}, time (data): 4.000 (0.100)]' in caplog.messages[-1]

    @pytest.mark.parametrize('waits', [True, False])
    def test_slow_first_iterations_are_reported(self, workdir, quick_opt, write_opt, monkeypatch, waits):
        monkeypatch.setattr(progress, '_FIRST', 0 if waits else 600)
        monkeypatch.setattr(progress, '_INTERVAL', 0)
        quick_opt['train']['total_iter'] = 6
        quick_opt['logger']['print_freq'] = 4
        quick_opt['drtl']['weighting']['relation'] = 'uniform'
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        log = next((workdir / 'experiments/drtl_x4').glob('*.log')).read_text()
        lines = re.findall(r'Iteration (\d) of 6 is done; the log has losses and times every 4 iterations\.', log)
        assert lines == (['1', '2', '3'] if waits else [])

    @pytest.mark.parametrize(('total', 'expected'), [(4, [2, 4]), (5, [2, 4, 5])])
    def test_validations_name_their_iteration_and_are_not_repeated(
        self, workdir, quick_opt, write_opt, total, expected
    ):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        quick_opt['train']['total_iter'] = total
        quick_opt['datasets']['train']['num_episodes'] = 4  # two iterations an epoch
        quick_opt['val'].update(val_freq=2, save_img=True)
        quick_opt['drtl']['weighting']['relation'] = 'uniform'
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        root = workdir / 'experiments/drtl_x4'
        log = next(root.glob('*.log')).read_text()
        assert log.count('Validation sample_camera\n') == len(expected)
        assert set(map(int, re.findall(r'@ (\d+) iter', log))) <= set(expected)
        events = EventAccumulator(str(workdir / 'tb_logger/drtl_x4')).Reload()
        steps = [event.step for event in events.Scalars('metrics/sample_camera/psnr_y')]
        assert steps == expected
        rows = [line.split(',') for line in (root / 'metrics.csv').read_text().splitlines()]
        assert [int(row[0]) for row in rows if row[1:3] == ['sample_camera', 'psnr_y']] == expected
        images = (root / 'visualization/coffee').iterdir()
        assert {path.stem for path in images} == {f'coffee_{iteration}' for iteration in expected}

    def test_a_run_that_is_resumed_at_its_end_validates_once(self, workdir, quick_opt, write_opt):
        quick_opt['val']['val_freq'] = 2
        quick_opt['logger']['save_checkpoint_freq'] = 2
        path = write_opt(quick_opt)
        for _ in range(2):
            assert cli.main(['train', '-opt', path, '--auto_resume']) == 0
            log = max((workdir / 'experiments/drtl_x4').glob('*.log')).read_text()
            assert log.count('Validation sample_camera\n') == 1

    def test_the_camera_fit_before_a_run_is_shown(self, workdir, quick_opt, write_opt, capsys):
        quick_opt['drtl']['camera_fit'] = True
        quick_opt['datasets']['train']['target']['seed'] = 1
        quick_opt['datasets']['train']['target']['num_shot'] = 2  # no other test has this fit
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        error = capsys.readouterr().err
        assert error.index('basicsr: Fitting the camera (2 pairs).\n') < error.index(
            'Fitting the camera (2 pairs) took'
        )
        log = next((workdir / 'experiments/drtl_x4').glob('*.log')).read_text()
        assert re.search(r'The camera was fitted before this run started, in \d+\.\d s\.', log)
