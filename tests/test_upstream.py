"""Our loop against BasicSR's own, and our option files in BasicSR's own pipelines."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from drtl_plugin import cli
from tests.conftest import OPTIONS
from tests.runtime.runs import equal

CAMERA = 'datasets/drtl_sample/camera'


def upstream(pipeline: str, root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run ``basicsr.train.train_pipeline`` or ``basicsr.test.test_pipeline`` in a process of its own."""
    module, root = pipeline.partition('_')[0], str(root)
    script = f'import sys, drtl_plugin\nfrom basicsr.{module} import {pipeline}\n{pipeline}(sys.argv.pop(1))'
    command = [sys.executable, '-c', script, root, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture
def plain_opt(quick_opt) -> dict:
    """An option file for ``SRModel``: validated, saved, and several epochs long."""
    pairs = {'type': 'PairedImageDataset', 'io_backend': {'type': 'disk'}}
    return {
        **{key: quick_opt[key] for key in ('scale', 'manual_seed', 'network_g')},
        'name': 'plain',
        'model_type': 'SRModel',
        'num_gpu': 0,
        'datasets': {
            'train': {
                **pairs,
                **{'name': 'pairs', 'dataroot_gt': f'{CAMERA}/support/gt', 'dataroot_lq': f'{CAMERA}/support/lq'},
                **{'gt_size': 64, 'use_hflip': True, 'use_rot': True, 'dataset_enlarge_ratio': 1},
                **{'num_worker_per_gpu': 0, 'batch_size_per_gpu': 2},
            },
            'val': {**pairs, 'name': 'val', 'dataroot_gt': f'{CAMERA}/val/gt', 'dataroot_lq': f'{CAMERA}/val/lq'},
        },
        'path': {'pretrain_network_g': None, 'strict_load_g': True, 'resume_state': None},
        'train': {
            'ema_decay': 0.9,
            'optim_g': {'type': 'Adam', 'lr': 1e-3, 'weight_decay': 0, 'betas': [0.9, 0.99]},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [3], 'gamma': 0.5},
            'total_iter': 4,
            'warmup_iter': 2,
            'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
        },
        'val': {'val_freq': 3, 'save_img': False, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 4}}},
        'logger': {'print_freq': 1, 'save_checkpoint_freq': 2, 'use_tb_logger': False},
    }


def as_gan(opt: dict) -> None:
    """Turn the options into those of an ``ESRGANModel``."""
    opt.update(name='gan', model_type='ESRGANModel')
    network = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'num_grow_ch': 4}
    opt['network_g'] = {'type': 'RRDBNet', **network}
    opt['network_d'] = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}
    opt['train'].update(
        optim_d={'type': 'Adam', 'lr': 1e-3, 'weight_decay': 0, 'betas': [0.9, 0.99]},
        gan_opt={'type': 'GANLoss', 'gan_type': 'vanilla', 'real_label_val': 1.0, 'fake_label_val': 0.0}
        | {'loss_weight': 0.1},
        net_d_iters=1,
        net_d_init_iters=0,
    )


def checkpoints(root: Path) -> dict[str, object]:
    """All networks and training states, without the states of random generators."""
    found = {}
    for path in sorted(root.glob('*/*')):
        if path.suffix in ('.pth', '.state'):
            found[path.name] = torch.load(path, weights_only=True)
            found[path.name].pop('random', None)
    return found


@pytest.mark.parametrize('gan', [False, True])
@pytest.mark.parametrize('workers', [0, 1])
def test_our_loop_trains_bit_identical_to_basicsrs(workdir, plain_opt, write_opt, gan, workers):
    """Although we check the run beforehand, and validate without changing the course of training."""
    if gan:
        as_gan(plain_opt)
    plain_opt['datasets']['train']['num_worker_per_gpu'] = workers
    path = write_opt(plain_opt)
    assert cli.main(['train', '-opt', path]) == 0
    upstream('train_pipeline', workdir / 'theirs', '-opt', path)
    ours, theirs = (checkpoints(Path(root, 'experiments', plain_opt['name'])) for root in ('.', 'theirs'))
    expected = {f'net_{net}_{i}.pth' for net in ('gd' if gan else 'g') for i in (2, 4, 'latest')}
    assert set(ours) == set(theirs) == expected | {'2.state', '4.state'}
    assert all(equal(ours[name], theirs[name]) for name in ours)


def test_training_goes_on_until_total_iter(workdir, plain_opt, write_opt):
    """Two steps an epoch; BasicSR counts three, and its loop would end after eight steps."""
    plain_opt['train']['total_iter'] = 9
    plain_opt['logger']['save_checkpoint_freq'] = 9
    assert cli.main(['train', '-opt', write_opt(plain_opt)]) == 0
    assert Path('experiments/plain/training_states/9.state').is_file()


def test_too_few_images_for_a_step_are_refused(workdir, plain_opt, write_opt, capsys):
    plain_opt['datasets']['train']['batch_size_per_gpu'] = 6
    assert cli.main(['train', '-opt', write_opt(plain_opt)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'datasets.train: its 5 images are fewer than the 6 of a step; lower batch_size_per_gpu' in line


def test_basicsrs_own_pipelines_train_and_test_our_model(workdir):
    """``options/drtl_x4.yml``, shortened, and read by BasicSR's own ``parse_options``."""
    shortened = (
        *('train:total_iter=2', 'network_g:num_feat=8', 'network_g:num_block=1', 'datasets:train:gt_size=64'),
        *('drtl:adapt:steps=2', 'val:val_freq=2', 'logger:save_checkpoint_freq=2', 'drtl:camera_fit=false'),
        "drtl:hooks=[{'type':'RelationHook','interval':1,'num_patches':2,'transfer_steps':1}]",
    )
    result = upstream('train_pipeline', workdir, '-opt', str(OPTIONS / 'drtl_x4.yml'), '--force_yml', *shortened)
    assert 'Validation sample_camera_adapted' in result.stderr
    root = workdir / 'experiments/drtl_x4'
    for name in ('net_g_2', 'net_g_adapted_latest'):
        content = torch.load(root / f'models/{name}.pth', weights_only=True)
        assert all(weight.isfinite().all() for weight in content['params'].values())
    assert torch.load(root / 'training_states/2.state', weights_only=True)['iter'] == 2

    opt = yaml.safe_load((OPTIONS / 'test_drtl_x4.yml').read_text(encoding='utf-8'))
    opt['network_g'].update(num_feat=8, num_block=1)
    Path('test.yml').write_text(yaml.safe_dump(opt))
    upstream('test_pipeline', workdir, '-opt', 'test.yml')
    (table,) = (workdir / 'results' / opt['name']).glob('metrics_*.csv')
    assert 'network' in table.read_text()
