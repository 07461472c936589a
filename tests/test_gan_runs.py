"""GAN runs from the command line: killed and resumed, and the shipped file."""

import random
import signal

import pytest
import torch
import yaml
from basicsr.archs import build_network

from drtl_plugin import cli
from tests.conftest import OPTIONS
from tests.runtime.runs import assert_same_run, equal, kill_now_and_then, long_opt, start, wait_for  # noqa: F401

_TASKS = ('name', 'type', 'dataroot_gt', 'io_backend', 'gt_size', 'distortions', 'target')


@pytest.fixture
def long_gan_opt(long_opt) -> dict:  # noqa: F811
    del long_opt['drtl']['inner']
    long_opt['drtl']['pipeline'] = 'pretrain'
    long_opt['network_g'] = {
        **{'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3},
        **{'num_feat': 8, 'num_block': 1, 'num_grow_ch': 4},
    }
    long_opt['network_d'] = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}
    long_opt['train'].update(
        optim_d={'type': 'Adam', 'lr': 1e-3},
        gan_opt={'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': 0.1},
        frequency_opt={'type': 'FFTLoss'},
    )
    return long_opt


@pytest.mark.slow
def test_a_gan_that_is_killed_ends_as_one_that_is_not(workdir, long_gan_opt):
    path = workdir / 'whole.yml'
    path.write_text(yaml.safe_dump({**long_gan_opt, 'name': 'whole'}))
    process = start(workdir, str(path))
    process.join()
    assert process.exitcode == 0, (workdir / 'output.txt').read_text()
    kill_now_and_then(workdir, long_gan_opt, 2, random.Random(0))
    roots = [workdir / 'experiments' / name for name in ('whole', 'killed')]
    assert_same_run(*roots)
    for label in ('net_d', 'net_g', 'net_g_adapted'):
        assert all((root / f'models/{label}_latest.pth').is_file() for root in roots)
    optimizers = torch.load(roots[1] / 'training_states/24.state', weights_only=True)['optimizers']
    assert len(optimizers) == 2 and all(optimizer['state'] for optimizer in optimizers)


@pytest.mark.slow
def test_the_shipped_file_runs(workdir, write_opt):
    opt = yaml.safe_load((OPTIONS / 'drtl_esrgan_x4.yml').read_text(encoding='utf-8'))
    opt['train'].update(total_iter=2)
    opt['drtl']['camera_fit'] = False
    opt['drtl']['adapt'].update(steps=2, batch_size=2)
    opt['val'].update(val_freq=100)
    opt['drtl']['hooks'] = [{'type': 'RelationHook', 'interval': 1, 'num_patches': 2, 'transfer_steps': 1}]
    assert cli.main(['train', '-opt', write_opt(opt)]) == 0
    models = workdir / 'experiments/drtl_esrgan_x4/models'
    assert {'net_g_latest.pth', 'net_d_latest.pth', 'net_g_adapted_latest.pth'} <= {p.name for p in models.iterdir()}
    assert torch.load(models / 'net_g_latest.pth', weights_only=True)['losses'] == ['frequency', 'gan', 'pixel']


def test_an_adaptation_that_is_killed_and_repeated_ends_the_same(workdir, long_gan_opt):
    torch.save({'params': build_network(long_gan_opt['network_g']).state_dict()}, workdir / 'w.pth')
    train = long_gan_opt['train']
    opt = {
        **{key: long_gan_opt[key] for key in ('scale', 'num_gpu', 'manual_seed', 'network_g', 'network_d')},
        'model_type': 'DRTLAdaptModel',
        'datasets': {'train': {key: long_gan_opt['datasets']['train'][key] for key in _TASKS}},
        'drtl': {
            'camera_fit': False,
            'weighting': {'relation': 'uniform'},
            'adapt': {'steps': 20, 'batch_size': 2},
        },
        'path': {'pretrain_network_g': 'w.pth'},
        'train': {key: train[key] for key in ('pixel_opt', 'frequency_opt', 'gan_opt', 'optim_d')},
    }
    adapted = {}
    for name, kills in (('whole', False), ('killed', True)):
        path, root = workdir / f'{name}.yml', workdir / 'experiments' / name
        path.write_text(yaml.safe_dump({**opt, 'name': name}))
        if kills:
            process = start(workdir, str(path))
            wait_for(process, root, '*.log', 'Adapting to the target')
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL, (workdir / 'output.txt').read_text()
            assert not list(root.glob('models/net_g_adapted*'))
        process = start(workdir, str(path))
        process.join()
        assert process.exitcode == 0, (workdir / 'output.txt').read_text()
        adapted[name] = torch.load(root / 'models/net_g_adapted_latest.pth', weights_only=True)
    assert equal(adapted['whole'], adapted['killed'])
