"""Several processes against one with the joint batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from drtl_plugin.compat.distributed import init_dist
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.runtime.distributed import average_gradients, of_first_process
from tests.runtime.runs import equal


def start(*arguments: str, processes: int = 1, cwd: Path) -> subprocess.CompletedProcess:
    """Run a module or file, in several processes by torchrun; without GPUs."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] * (processes > 1)
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def trained(opt: dict, workdir: Path, processes: int) -> tuple[dict, str]:
    """The weights after ``basicsr train``, and its output."""
    batch = opt['datasets']['train']['batch_size_per_gpu']
    assert batch % processes == 0
    opt = {**opt, 'name': f'by_{processes}'}
    opt['datasets']['train']['batch_size_per_gpu'] = batch // processes
    path = workdir / f'{opt["name"]}.yml'
    path.write_text(yaml.safe_dump(opt), encoding='utf-8')
    opt['datasets']['train']['batch_size_per_gpu'] = batch
    launcher = ['--launcher', 'pytorch'] * (processes > 1)
    done = start('-m', 'drtl_plugin.cli', 'train', '-opt', str(path), *launcher, processes=processes, cwd=workdir)
    assert done.returncode == 0, done.stderr
    models = workdir / 'experiments' / opt['name'] / 'models'
    state = torch.load(models / 'net_g_latest.pth', weights_only=True)['params']
    assert (models / 'net_g_adapted_latest.pth').is_file()
    return state, done.stdout


@pytest.mark.parametrize('pipeline', ['pretrain', 'meta'])
@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_with_the_joint_batch(workdir, quick_opt, pipeline):
    """Random distortions, tasks drawn by a relation that is measured on the way: all of it is the same."""
    quick_opt['drtl']['pipeline'] = pipeline
    quick_opt['drtl']['weighting'].update(relation='gradient', mode='sampling')
    quick_opt['datasets']['train'].update(batch_size_per_gpu=4, num_worker_per_gpu=1)
    quick_opt['train']['total_iter'] = 5
    # Adam without this divides rounding errors by themselves where gradients are next to nothing.
    quick_opt['train']['optim_g']['eps'] = 1e-3
    one, _ = trained(quick_opt, workdir, 1)
    two, output = trained(quick_opt, workdir, 2)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6)
    assert output.count('after adaptation') == 1  # the first process speaks


def test_a_process_that_fails_does_not_keep_the_others(workdir, quick_opt):
    path = workdir / 'opt.yml'
    quick_opt['drtl']['hooks'].append({'type': 'FailingHook'})
    path.write_text(yaml.safe_dump(quick_opt), encoding='utf-8')
    (workdir / 'failing.py').write_text(_FAILING_HOOK, encoding='utf-8')
    arguments = ['-m', 'drtl_plugin.cli', 'train', '-opt', str(path), '--launcher', 'pytorch', '--import', 'failing']
    done = start(*arguments, processes=2, cwd=workdir)
    assert done.returncode != 0
    assert 'ZeroDivisionError: of the second process' in done.stderr


_FAILING_HOOK = """
from drtl_plugin.hooks import META_HOOK_REGISTRY, MetaTrainerHook

@META_HOOK_REGISTRY.register()
class FailingHook(MetaTrainerHook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.opt['rank'] == 1:
            raise ZeroDivisionError('of the second process')
"""


@pytest.mark.slow
def test_plain_models_run_in_several_processes_without_gpu(workdir, quick_opt):
    quick_opt.update(model_type='SRModel', name='plain')
    del quick_opt['drtl'], quick_opt['network_r']
    sample = quick_opt['datasets']['train']['target']
    quick_opt['datasets']['train'] = {
        **{'name': 'pairs', 'type': 'PairedImageDataset', 'dataroot_gt': sample['dataroot_gt']},
        **{'dataroot_lq': sample['dataroot_lq'], 'io_backend': {'type': 'disk'}, 'gt_size': 64, 'use_hflip': True},
        **{'use_rot': True, 'num_worker_per_gpu': 0, 'batch_size_per_gpu': 1, 'dataset_enlarge_ratio': 1},
    }
    path = workdir / 'plain.yml'
    path.write_text(yaml.safe_dump(quick_opt), encoding='utf-8')
    arguments = ['-m', 'drtl_plugin.cli', 'train', '-opt', str(path), '--launcher', 'pytorch']
    done = start(*arguments, processes=2, cwd=workdir)
    assert done.returncode == 0, done.stderr
    assert (workdir / 'experiments' / 'plain' / 'models' / 'net_g_latest.pth').is_file()


_PROCESS = """
import torch
from drtl_plugin.compat.distributed import init_dist
from drtl_plugin.errors import DataError
from drtl_plugin.runtime import distributed

init_dist('pytorch')
rank = torch.distributed.get_rank()
distributed._BUCKET = 100  # bytes: several buckets
kinds = [(width, dtype) for dtype in (torch.float, torch.double) for width in (1, 2, 7, 4, 1)]
parameters = [torch.nn.Parameter(torch.zeros(5, width, dtype=dtype)) for width, dtype in kinds]
parameters.append(torch.nn.Parameter(torch.zeros(3)))  # without gradient
for i, p in enumerate(parameters[:-1]):
    p.grad = torch.full_like(p, 10.0 * i + rank)
distributed.average_gradients(parameters)
assert all((p.grad == 10.0 * i + 0.5).all() for i, p in enumerate(parameters[:-1]))
assert parameters[-1].grad is None
weights = torch.tensor([rank])
distributed.broadcast([weights])
assert weights.item() == 0
assert distributed.of_first_process(lambda: f'of {rank}') == 'of 0'

def fail():
    raise DataError(f'found by {rank}')

def crash():
    raise ZeroDivisionError(rank)

try:
    distributed.of_first_process(fail)
except DataError as error:
    assert str(error) == 'found by 0'
else:
    raise AssertionError('no error')
try:
    distributed.of_first_process(crash)
except (ZeroDivisionError if rank == 0 else RuntimeError) as error:
    assert '0' in str(error)
else:
    raise AssertionError('no error')
distributed.end_dist()
"""


def test_gradients_are_averaged_and_answers_shared(tmp_path):
    (tmp_path / 'process.py').write_text(_PROCESS, encoding='utf-8')
    done = start(str(tmp_path / 'process.py'), processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_process_alone_does_as_before():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    average_gradients([parameter])
    assert parameter.grad.tolist() == [1, 1]
    assert of_first_process(lambda: 3) == 3
    with pytest.raises(DataError):
        of_first_process(lambda: (_ for _ in ()).throw(DataError('wrong')))


def test_processes_that_no_launcher_started_are_an_error(monkeypatch):
    for name in ('RANK', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OptionError, match=r'RANK.* is not set; start the processes with torchrun'):
        init_dist('pytorch')
    with pytest.raises(OptionError, match=r'SLURM_PROCID.* is not set; start the processes with srun'):
        init_dist('slurm')


class TestSlurm:
    @pytest.fixture
    def environment(self, monkeypatch, tmp_path):
        """Variables of a job, and a ``scontrol`` that names what it is asked for."""
        script = tmp_path / 'scontrol'
        script.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] || exit 1\n[ -n "$3" ] || exit 1\necho "<$3>"\n')
        script.chmod(0o755)
        monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
        for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
            monkeypatch.setenv(name, 'to be set')  # and put back
        for name, value in (('PROCID', '3'), ('LOCALID', '1'), ('NTASKS', '4'), ('NODELIST', 'node[1-2]')):
            monkeypatch.setenv(f'SLURM_{name}', value)
        joined = []
        monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *a, **_: joined.append(a))
        monkeypatch.setattr(torch.multiprocessing, 'set_start_method', lambda *_, **__: None)
        monkeypatch.setattr('torch.cuda.is_available', lambda: False)
        return joined

    def test_start(self, environment):
        init_dist('slurm', backend='nccl', port=1234)  # as BasicSR's option files have it
        names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
        assert [os.environ[name] for name in names] == ['3', '1', '4', '<node[1-2]>', '1234']
        assert environment == [('gloo',)]

    def test_node_lists_are_no_commands(self, environment, monkeypatch, tmp_path):
        """CVE-2024-27763: BasicSR puts the list into a shell's command line."""
        victim = tmp_path / 'victim'
        monkeypatch.setenv('SLURM_NODELIST', f'n;touch${{IFS}}{victim};$(touch {victim})')
        init_dist('slurm')
        assert not victim.exists()

    def test_no_host(self, environment, monkeypatch):
        monkeypatch.setenv('SLURM_NODELIST', '')
        with pytest.raises(OptionError, match='names no host'):
            init_dist('slurm')


_KILLING_HOOK = """
import os
import signal
from pathlib import Path
from drtl_plugin.hooks import META_HOOK_REGISTRY, MetaTrainerHook

@META_HOOK_REGISTRY.register()
class KillingHook(MetaTrainerHook):
    def kill_once(self, runner, moment, rank):
        mark = Path(f'killed_{moment}_{runner.opt["name"]}')
        if runner.opt['name'] == 'killed' and runner.opt['rank'] == rank and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.num_update == 1:
            self.kill_once(runner, 'before_a_checkpoint', rank=1)
        if runner.num_update == 5:
            self.kill_once(runner, 'in_training', rank=0)

    def before_save_checkpoint(self, runner, checkpoint):
        if runner.num_update == 8:
            self.kill_once(runner, 'at_the_end', rank=0)
"""


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_ends_as_one_that_was_not_killed(workdir, quick_opt):
    """Workers are killed before the first checkpoint, in training and at the end; an older run has the same name."""
    (workdir / 'killing.py').write_text(_KILLING_HOOK, encoding='utf-8')
    quick_opt['train']['total_iter'] = 8
    quick_opt['drtl']['hooks'].append({'type': 'KillingHook'})
    quick_opt['datasets']['train'].update(batch_size_per_gpu=2, num_worker_per_gpu=0, num_episodes=12)
    quick_opt['logger'].update(save_checkpoint_freq=2, use_tb_logger=False)
    older = workdir / 'experiments/killed/training_states/99.state'
    older.parent.mkdir(parents=True)
    older.write_text('of an older run')
    for name in ('whole', 'killed'):
        path = workdir / f'{name}.yml'
        path.write_text(yaml.safe_dump({**quick_opt, 'name': name}), encoding='utf-8')
        arguments = ['-m', 'drtl_plugin', 'train', '-opt', str(path), '--launcher', 'pytorch', '--import', 'killing']
        done = start('--max-restarts=3', *arguments, processes=2, cwd=workdir)
        assert done.returncode == 0, done.stderr
    assert len(list(workdir.glob('killed_*_killed'))) == 3
    whole, killed = workdir / 'experiments/whole', workdir / 'experiments/killed'
    files = sorted(path.relative_to(whole) for path in whole.glob('*/*') if path.suffix in ('.pth', '.state'))
    assert {'net_g_latest.pth', 'net_g_adapted_latest.pth', '8.state'} <= {path.name for path in files}
    for name in files:
        assert equal(*(torch.load(folder / name, weights_only=True) for folder in (whole, killed))), name
    for name in ('weights.csv', 'knowledge_graph.json'):
        assert (whole / name).read_text() == (killed / name).read_text()
    archived = list((workdir / 'experiments').glob('killed_archived_*'))
    assert len(archived) == 1
    assert (archived[0] / 'training_states/99.state').read_text() == 'of an older run'
