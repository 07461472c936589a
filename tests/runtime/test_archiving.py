"""Runs that would archive, and then miss, what they are to read."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from drtl_plugin import cli
from drtl_plugin.sources.sample import SAMPLE_ROOT


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def refusal(capsys, *arguments: str) -> str:
    """The one line by which a command is refused, with all that is in experiments/ and results/ left as it was."""
    folders = [Path('experiments'), Path('results')]
    before = [content(folder) for folder in folders]
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    assert [content(folder) for folder in folders] == before
    (line,) = capsys.readouterr().err.splitlines()
    assert 'choose another name (--force_yml name=…) or move it' in line
    return line


@pytest.fixture
def finished(workdir, quick_opt, write_opt) -> Path:
    """A run, drtl_x4, with a training state."""
    quick_opt['logger']['save_checkpoint_freq'] = 1
    assert cli.main(['train', '-opt', write_opt(quick_opt, 'drtl_x4.yml')]) == 0
    return Path('experiments/drtl_x4')


@pytest.mark.slow
def test_training_keeps_what_it_reads(finished, quick_opt, write_opt, capsys):
    copy = str(finished / 'drtl_x4.yml')
    assert f'-opt: {copy} is in experiments/drtl_x4, which' in refusal(capsys, 'train', '-opt', copy)
    # Other names, and resumed runs, take nothing away.
    assert cli.main(['train', '-opt', copy, '--force_yml', 'name=other']) == 0
    assert cli.main(['train', '-opt', copy, '--auto_resume', '--force_yml', 'train:total_iter=3']) == 0
    state = f'path:resume_state={finished}/training_states/3.state'
    assert cli.main(['train', '-opt', copy, '--force_yml', 'train:total_iter=4', state]) == 0
    assert not list(Path('experiments').glob('*_archived_*'))
    # Without a state to resume from, a run begins anew.
    shutil.rmtree(finished / 'training_states')
    refusal(capsys, 'train', '-opt', copy, '--auto_resume')

    path = write_opt(quick_opt)
    weights = f'{finished}/models/net_g_latest.pth'
    line = refusal(capsys, 'train', '-opt', path, '--force_yml', f'path:pretrain_network_g={weights}')
    assert f'path.pretrain_network_g: {weights} is in experiments/drtl_x4' in line
    shutil.copytree(Path(SAMPLE_ROOT, 'camera/support'), finished / 'pairs')
    target = f'datasets:train:target:dataroot_lq={finished.absolute()}/pairs/lq'
    assert 'datasets.train.target.dataroot_lq: ' in refusal(capsys, 'train', '-opt', path, '--force_yml', target)
    # Also by another way to the same place.
    Path('link').symlink_to(finished / 'pairs')
    val = 'datasets:val:dataroot_gt=link/gt'
    assert 'datasets.val.dataroot_gt: link/gt is in' in refusal(capsys, 'train', '-opt', path, '--force_yml', val)


def test_testing_and_measuring_keep_what_they_read(finished, quick_opt, write_opt, capsys):
    for name in ('t', 't_relation'):
        Path('results', name).mkdir(parents=True)
        shutil.copy(finished / 'models/net_g_latest.pth', f'results/{name}/w.pth')
    opt = {key: quick_opt[key] for key in ('scale', 'num_gpu', 'network_g', 'model_type')}
    opt.update(name='t', datasets={'test_1': quick_opt['datasets']['val']}, val={'save_img': False})
    opt['path'] = {'pretrain_network_g': 'results/t/w.pth'}
    path = write_opt(opt)
    assert 'path.pretrain_network_g: results/t/w.pth is in results/t,' in refusal(capsys, 'test', '-opt', path)
    Path('results/t/opt.yml').write_text(yaml.safe_dump(opt))
    assert '-opt: results/t/opt.yml is in results/t,' in refusal(capsys, 'test', '-opt', 'results/t/opt.yml')

    quick_opt['name'] = 't'
    quick_opt['path']['pretrain_network_g'] = 'results/t_relation/w.pth'
    assert 't_relation/w.pth is in results/t_relation,' in refusal(capsys, 'relation', '-opt', write_opt(quick_opt))
    assert torch.load('results/t_relation/w.pth')
