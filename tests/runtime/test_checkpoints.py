import contextlib
import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from basicsr.models.base_model import BaseModel

from drtl_plugin.compat import saving
from drtl_plugin.errors import DataError
from drtl_plugin.runtime import checkpoints, resume
from drtl_plugin.runtime.checkpoints import SaveError


class Bomb:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class FullDisk:
    """A file on a disk with room for some bytes."""

    def __init__(self, path, mode):
        self.file = open(path, mode)  # noqa: SIM115
        self.room = 1000

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.room -= len(memoryview(content).cast('B'))
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(content)

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()


class TestSave:
    def test_what_is_read_is_what_was_saved(self, tmp_path):
        content = {'params': {'weight': torch.rand(3, 4)}, 'random': checkpoints.random_state(), 'epoch': 3}
        checkpoints.save(content, tmp_path / 'a.pth')
        read = checkpoints.read(tmp_path / 'a.pth', 'key')
        assert torch.equal(read['params']['weight'], content['params']['weight'])
        assert read['epoch'] == 3
        assert [path.name for path in tmp_path.iterdir()] == ['a.pth']

    def test_a_full_disk_is_named_and_the_earlier_file_whole(self, tmp_path, monkeypatch):
        path = tmp_path / 'a.pth'
        checkpoints.save({'x': torch.zeros(1)}, path)
        monkeypatch.setattr(checkpoints, 'open', FullDisk, raising=False)
        with pytest.raises(SaveError, match=r'a\.pth: cannot be written \(No space left on device\)'):
            checkpoints.save({'x': torch.zeros(10_000)}, path)
        assert torch.equal(checkpoints.read(path, 'key')['x'], torch.zeros(1))
        assert [file.name for file in tmp_path.iterdir()] == ['a.pth']

    def test_a_folder_that_is_missing_is_named(self, tmp_path):
        with pytest.raises(SaveError, match=r'a\.pth: cannot be written \(No such file or directory\)'):
            checkpoints.save({}, tmp_path / 'missing' / 'a.pth')

    def test_models_of_basicsr_save_whole_files_or_fail(self, tmp_path, monkeypatch):
        assert not saving.install()  # it was done by importing the package
        model = BaseModel({'num_gpu': 0, 'is_train': True, 'path': {'models': str(tmp_path)}})
        net = torch.nn.Linear(2, 2)
        model.save_network([net, net], 'net_g', 7, param_key=['params', 'params_ema'])
        content = torch.load(tmp_path / 'net_g_7.pth', weights_only=True)
        assert set(content) == {'params', 'params_ema'}  # and no network, of which the options say nothing
        model.save_network(net, 'generator', 7)
        assert (tmp_path / 'generator_7.pth').is_file()
        assert torch.equal(content['params_ema']['weight'], net.weight)
        monkeypatch.setattr(checkpoints.os, 'fsync', lambda _: (_ for _ in ()).throw(OSError(errno.EIO, 'bad disk')))
        with pytest.raises(SaveError, match='bad disk'):
            model.save_network(net, 'net_g', 7)


class TestRead:
    def test_code_is_refused_and_does_not_run(self, tmp_path):
        torch.save({'params': {}, 'bomb': Bomb(tmp_path / 'exploded')}, tmp_path / 'a.pth')
        with pytest.raises(DataError, match=r'path\.x: .*a\.pth contains .* code, which is not run'):
            checkpoints.read(tmp_path / 'a.pth', 'path.x')
        assert not (tmp_path / 'exploded').exists()

    def test_what_a_gpu_has_saved_is_read_without_one(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr('torch.serialization.location_tag', lambda storage: 'cuda:0')
            checkpoints.save({'w': torch.ones(3)}, tmp_path / 'a.pth')
        assert b'cuda:0' in (tmp_path / 'a.pth').read_bytes()
        assert torch.equal(checkpoints.read(tmp_path / 'a.pth', 'key')['w'], torch.ones(3))

    @pytest.mark.parametrize('content', [b'', b'x', b'no weights', b'PK\x03\x04 cut', bytes(5000)])
    def test_other_files_are_named(self, tmp_path, content):
        (tmp_path / 'a.pth').write_bytes(content)
        with pytest.raises(DataError, match=r'path\.x: .*a\.pth is damaged, or contains no weights or state'):
            checkpoints.read(tmp_path / 'a.pth', 'path.x')

    def test_damaged_files_of_the_old_format_are_named(self, tmp_path):
        torch.save({'w': torch.ones(3)}, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
        whole = (tmp_path / 'a.pth').read_bytes()
        rng = random.Random(0)
        for _ in range(300):
            content = bytearray(whole)
            content[rng.randrange(len(content))] = rng.randrange(256)
            (tmp_path / 'a.pth').write_bytes(content)
            with contextlib.suppress(DataError):
                checkpoints.read(tmp_path / 'a.pth', 'path.x')

    def test_missing_files_are_named(self, tmp_path):
        with pytest.raises(DataError, match=r'path\.x: .*a\.pth cannot be read \(No such file'):
            checkpoints.read(tmp_path / 'a.pth', 'path.x')


STATE = {'iter': 0, 'epoch': 0, 'optimizers': [], 'schedulers': []}


class TestLoadResumeState:
    @pytest.fixture
    def opt(self, tmp_path) -> dict:
        path = {'training_states': str(tmp_path), 'models': str(tmp_path), 'resume_state': None}
        return {'auto_resume': True, 'path': path, 'network_g': {}}

    @pytest.fixture(autouse=True)
    def states(self, tmp_path):
        for iteration in (900, 1000):
            checkpoints.save(
                {**STATE, 'iter': iteration, 'weights': torch.rand(10_000)}, tmp_path / f'{iteration}.state'
            )
            checkpoints.save({'params': {'w': torch.rand(10_000)}}, tmp_path / f'net_g_{iteration}.pth')

    def test_takes_the_newest_state_by_number(self, opt, tmp_path):
        assert resume.load_resume_state(opt)['iter'] == 1000
        assert opt['path']['pretrain_network_g'] == str(tmp_path / 'net_g_1000.pth')

    def test_starts_anew_where_there_is_no_state(self, opt, tmp_path):
        opt['path']['training_states'] = str(tmp_path / 'missing')
        assert resume.load_resume_state(opt) is None
        assert resume.load_resume_state({**opt, 'auto_resume': False}) is None

    @pytest.mark.parametrize('name', ['1000.state', 'net_g_1000.pth'])
    @pytest.mark.parametrize('damage', ['cut', 'emptied', 'flipped'])
    def test_takes_the_newest_that_is_whole(self, opt, tmp_path, capsys, name, damage):
        content = bytearray((tmp_path / name).read_bytes())
        if damage == 'flipped':  # a bit of the weights
            content[len(content) // 2] ^= 1
        (tmp_path / name).write_bytes({'cut': content[: len(content) // 2], 'emptied': b''}.get(damage, content))
        assert resume.load_resume_state(opt)['iter'] == 900
        assert opt['path']['pretrain_network_g'] == str(tmp_path / 'net_g_900.pth')
        assert 'basicsr: warning: iteration 1000 is damaged and skipped' in capsys.readouterr().err

    def test_passes_over_a_state_whose_network_is_gone(self, opt, tmp_path, capsys):
        (tmp_path / 'net_g_1000.pth').rename(tmp_path / 'net_d_1000.pth')
        (tmp_path / '1000.state.unfinished').touch()
        assert resume.load_resume_state(opt)['iter'] == 900
        assert 'net_g_1000.pth cannot be read (No such file' in capsys.readouterr().err
        assert not (tmp_path / '1000.state.unfinished').exists()

    def test_names_the_damaged_network_of_a_state_that_was_chosen(self, opt, tmp_path):
        opt.update(auto_resume=False)
        opt['path']['resume_state'] = str(tmp_path / '1000.state')
        (tmp_path / 'net_g_1000.pth').write_bytes((tmp_path / 'net_g_1000.pth').read_bytes()[:100])
        with pytest.raises(DataError, match=r'path\.pretrain_network_g: .*net_g_1000\.pth is damaged'):
            resume.load_resume_state(opt)

    def test_says_so_where_none_is_whole(self, opt, tmp_path):
        for path in tmp_path.glob('*.state'):
            path.write_bytes(b'')
        with pytest.raises(DataError, match=r'all training states in .* are damaged'):
            resume.load_resume_state(opt)

    def test_refuses_what_is_no_state(self, opt, tmp_path):
        opt.update(auto_resume=False)
        opt['path']['resume_state'] = str(tmp_path / 'net_g_900.pth')
        with pytest.raises(DataError, match=r'path\.resume_state: .*net_g_900\.pth is not a training state'):
            resume.load_resume_state(opt)

    def test_runs_no_code_of_a_file(self, opt, tmp_path):
        torch.save({**STATE, 'bomb': Bomb(tmp_path / 'exploded')}, tmp_path / 'a.state')
        opt.update(auto_resume=False)
        opt['path']['resume_state'] = str(tmp_path / 'a.state')
        with pytest.raises(DataError, match=r'path\.resume_state: .* code, which is not run'):
            resume.load_resume_state(opt)
        assert not (tmp_path / 'exploded').exists()

    def test_takes_the_place_of_basicsrs(self, monkeypatch):
        import basicsr.train

        monkeypatch.setattr(basicsr.train, 'load_resume_state', None)
        assert resume.install()
        assert basicsr.train.load_resume_state is resume.load_resume_state
        assert not resume.install()


class TestThinOut:
    @pytest.mark.parametrize(
        ('keep', 'best', 'left'),
        [
            (None, [], [5, 10, 15, 20, 25, 30]),
            (1, [], [20, 25, 30]),
            (2, [], [15, 20, 25, 30]),
            (2, [5, 20, 40], [5, 15, 20, 25, 30]),
            (9, [], [5, 10, 15, 20, 25, 30]),
        ],
    )
    def test_keeps_the_last_the_best_and_the_later_ones(self, tmp_path, keep, best, left):
        names = ['net_g_latest.pth', 'net_r_0.pth', 'other.txt']
        for iteration in range(5, 31, 5):
            names += [f'{iteration}.state', f'net_g_{iteration}.pth', f'net_g_adapted_{iteration}.pth']
        for name in names:
            (tmp_path / name).touch()
        opt = {'logger': {'keep_checkpoints': keep}, 'path': {'training_states': tmp_path, 'models': tmp_path}}
        checkpoints.thin_out(opt, 20, best)
        expected = names[:3] + [
            name for name in names[3:] if int(name.rstrip('.pth').split('_')[-1].split('.')[0]) in left
        ]
        assert {path.name for path in tmp_path.iterdir()} == set(expected)


def test_random_state_puts_all_generators_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()

    random.gauss(0, 1), np.random.randn()  # the second half of a pair is kept for the next draw
    state = checkpoints.random_state()
    first = draw()
    assert draw() != first
    checkpoints.set_random_state(state)
    assert draw() == first
