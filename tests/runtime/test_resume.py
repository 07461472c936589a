"""Runs that are killed, or whose disk is full, and resumed."""

import errno
import os
import random

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from drtl_plugin import cli
from drtl_plugin.runtime.resume import ResumingSampler
from tests.runtime.runs import assert_same_run, equal, kill_now_and_then, long_opt, start  # noqa: F401


@pytest.mark.parametrize('times', [2, 10])
@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(workdir, long_opt, times):  # noqa: F811
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


@pytest.mark.slow
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


class TestResumingWithinAnEpoch:
    SIZE, BATCH = 10, 3  # three steps an epoch, a sample left over

    def samples(self, state) -> list[int]:
        """What a run trains on from a state to the end of the second epoch."""
        opt = {'dist': False, 'num_gpu': 0, 'datasets': {'train': {'batch_size_per_gpu': self.BATCH}}}
        opt.update(rank=0, world_size=1)
        sampler = ResumingSampler(range(self.SIZE), opt, state)
        loader = DataLoader(range(self.SIZE), batch_size=self.BATCH, sampler=sampler, drop_last=True)
        seen = []
        for epoch in range(state['epoch'] if state else 0, 2):
            sampler.set_epoch(epoch)
            seen += [batch.tolist() for batch in loader]
        return seen

    @pytest.mark.parametrize('iteration', range(6))
    def test_goes_on_where_the_run_was_interrupted(self, iteration):
        whole = self.samples(None)
        assert len(whole) == 6
        state = {'epoch': max(iteration - 1, 0) // 3, 'iter': iteration}
        assert self.samples(state) == whole[iteration:]
