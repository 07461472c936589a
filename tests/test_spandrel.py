"""Published networks that spandrel recognises: adapted, used, and read again by spandrel."""

import importlib
import json
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from basicsr.utils import img2tensor
from safetensors import safe_open
from safetensors.torch import save_file
from spandrel import ModelLoader

from drtl_plugin import cli
from drtl_plugin.api import adapt_model
from drtl_plugin.api.adapt import adapt
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.models import adapter
from drtl_plugin.runtime.trained_network import load_trained

TRANSFORMER = {
    'embed_dim': 12,
    'depths': [2],
    'num_heads': [2],
    'window_size': 8,
    'upscale': 2,
    'upsampler': 'pixelshuffle',
}
# Architecture: its module and class in spandrel, arguments of a small instance, and its scale.
ARCHITECTURES = {
    'RRDBNet (ESRGAN)': ('ESRGAN', 'ESRGAN', {'num_filters': 16, 'num_blocks': 1, 'scale': 2}, 2),
    'SRVGGNetCompact': ('Compact', 'Compact', {'num_feat': 8, 'num_conv': 2, 'upscale': 2}, 2),
    'SwinIR': ('SwinIR', 'SwinIR', TRANSFORMER, 2),
    'HAT': ('HAT', 'HAT', {**TRANSFORMER, 'embed_dim': 16, 'compress_ratio': 2, 'squeeze_factor': 4}, 2),
    'DAT': ('DAT', 'DAT', {'embed_dim': 16, 'depth': [2], 'split_size': [4, 8], 'upscale': 2}, 2),
    'SPAN': ('SPAN', 'SPAN', {'num_in_ch': 3, 'num_out_ch': 3, 'feature_channels': 8, 'upscale': 2}, 2),
    'OmniSR': ('OmniSR', 'OmniSR', {'num_feat': 16, 'up_scale': 2}, 2),
    'SAFMN': ('SAFMN', 'SAFMN', {'dim': 8, 'n_blocks': 2, 'upscaling_factor': 2}, 2),
    'PLKSR': ('PLKSR', 'PLKSR', {'dim': 16, 'n_blocks': 2, 'upscaling_factor': 2}, 2),
    'DITN': ('DITN', 'DITN', {'dim': 12, 'ITL_blocks': 1, 'SAL_blocks': 1, 'upscale': 2}, 2),
    'DnCNN': ('DnCNN', 'DnCNN', {'in_nc': 3, 'out_nc': 3, 'nc': 8, 'nb': 8, 'act_mode': 'R'}, 1),
    'SCUNet': ('SCUNet', 'SCUNet', {'config': [1, 1, 1, 1, 1, 1, 1], 'dim': 64}, 1),
    'NAFNet': ('NAFNet', 'NAFNet', {'width': 8, 'enc_blk_nums': [1], 'dec_blk_nums': [1]}, 1),
}  # fmt: skip


def network(name: str) -> torch.nn.Module:
    module, class_name, arguments, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    return getattr(importlib.import_module(f'spandrel.architectures.{module}'), class_name)(**arguments)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_pairs(scale: int, side: int) -> None:
    """Three pairs of one scene: noise of several sizes, which can be aligned."""
    generator = np.random.default_rng(0)
    scene = sum(
        cv2.resize(generator.random((256 // size, 256 // size, 3)), (256, 256), interpolation=cv2.INTER_CUBIC)
        for size in (1, 4, 16)
    )
    scene = np.uint8(255 * (scene - scene.min()) / np.ptp(scene))
    for name, corner in (('a', 0), ('b', 60), ('c', 120)):
        gt = scene[corner : corner + side * scale, corner : corner + side * scale]
        cv2.imwrite(f'pairs/{name}_HR.png', gt)
        lq = gt if scale == 1 else cv2.resize(gt, (side, side), interpolation=cv2.INTER_AREA)
        noise = generator.normal(0, 6, lq.shape)
        cv2.imwrite(f'pairs/{name}_LR.png', (lq + noise).round().clip(0, 255))


@pytest.fixture
def quick(monkeypatch):
    """The option file of adapt, with less to measure."""
    options = adapt_model.adaptation_options

    def quick_options(*arguments):
        opt = options(*arguments)
        opt['datasets']['train'].update(distortions=[{'name': 'gaussian_noise'}, {'name': 'poisson_noise'}])
        opt['drtl']['weighting'] = {'effective_tasks': 1.5}
        opt['drtl']['hooks'] = [{'type': 'RelationHook', 'num_patches': 2, 'transfer_steps': 1}]
        opt['drtl']['adapt']['batch_size'] = 2
        return opt

    monkeypatch.setattr(adapt_model, 'adaptation_options', quick_options)
    monkeypatch.setattr(adapter, '_NUM_JUDGED', 2)


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[pytest.mark.slow] * (name == 'SCUNet')) for name in ARCHITECTURES]
)
def test_an_architecture_is_adapted_and_read_again(folder, quick, name):
    scale = ARCHITECTURES[name][3]
    net = network(name)
    torch.save({'params_ema': net.state_dict()}, 'published.pth')
    (folder / 'pairs').mkdir()
    write_pairs(scale, 80 if name == 'SCUNet' else 64)  # multiples of all windows
    assert cli.main(['adapt', '--pairs', 'pairs', '--weights', 'published.pth', '-o', 'mine', '--budget', '7']) == 0
    adapted = 'mine/net_g_adapted_latest.pth'
    assert cli.main(['upscale', '-i', 'pairs/a_LR.png', '-o', 'a.png', '--weights', adapted]) == 0
    assert cli.main(['export', '--weights', adapted, '--spandrel', 'adapted.safetensors']) == 0
    lq = img2tensor(cv2.imread('pairs/a_LR.png') / np.float32(255))[None]
    ours = load_trained(adapted)
    with torch.no_grad():
        expected = ours.net(lq).clamp(0, 1)
    assert ours.scale == scale
    for file in (adapted, 'adapted.safetensors'):
        theirs = ModelLoader().load_from_file(file)
        assert theirs.scale == scale
        assert set(theirs.model.state_dict()) == set(net.state_dict())
        assert torch.allclose(theirs(lq), expected, atol=1e-5)
    written = img2tensor(cv2.imread('a.png') / np.float32(255))[None]
    assert torch.allclose(written, expected, atol=0.6 / 255)
    with safe_open('adapted.safetensors', 'pt') as file:
        metadata = file.metadata()
    assert metadata['scale'] == str(scale)
    assert json.loads(metadata['adaptation'])['pairs'] == 3
    assert metadata['architecture'] == type(net).__name__


def test_images_that_are_smaller_than_a_window(folder, quick):
    """The pair is cut into quarters of 32 pixels."""
    torch.save(network('SCUNet').state_dict(), 'w.pth')
    (folder / 'pairs').mkdir()
    write_pairs(1, 64)
    for name in ('b_LR', 'b_HR', 'c_LR', 'c_HR'):
        (folder / f'pairs/{name}.png').unlink()
    with pytest.raises(DataError, match=r'--pairs: the network needs at least 40 LQ pixels a side, but .* has 32; use'):
        adapt('pairs', 'w.pth', 'mine')
    assert not (folder / 'mine').exists()


SMALL = 'SRVGGNetCompact'


@pytest.mark.parametrize('form', ['bare.pth', 'params.pth', 'state_dict.ckpt', 'plain.safetensors'])
def test_files_in_all_forms(folder, form):
    net = network(SMALL)
    key = form.partition('.')[0]
    if form.endswith('.safetensors'):
        save_file(net.state_dict(), form)
    else:
        torch.save(net.state_dict() if key == 'bare' else {key: net.state_dict()}, form)
    trained = load_trained(form)
    lq = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(trained.net(lq), net.eval()(lq), atol=1e-5)
    assert (trained.scale, trained.window) == (2, 1)


@pytest.mark.parametrize(('name', 'window'), [('SwinIR', 16), ('SCUNet', 40), ('DnCNN', 1)])
def test_windows(folder, name, window):
    torch.save(network(name).state_dict(), 'w.pth')
    assert load_trained('w.pth').window == window


def test_our_own_networks_as_safetensors(folder):
    """spandrel does not know EDSR; the file's metadata do."""
    from basicsr.archs import build_network

    options = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 4}
    net = build_network(dict(options))
    torch.save({'params': net.state_dict(), 'network': options, 'scale': 4, 'losses': ['pixel']}, 'w.pth')
    assert cli.main(['export', '--weights', 'w.pth', '--spandrel', 'w.safetensors']) == 0
    again = load_trained('w.safetensors')
    assert (again.options, again.scale, again.losses) == (options, 4, ('pixel',))
    assert all(torch.equal(weight, net.state_dict()[name]) for name, weight in again.net.state_dict().items())


def test_in_option_files(workdir, quick_opt, write_opt):
    """pretrain_network_g names any checkpoint; net_g and net_g_adapted are read by spandrel."""
    _, class_name, arguments, _ = ARCHITECTURES[SMALL]
    torch.manual_seed(0)
    module = importlib.import_module('spandrel.architectures.Compact')
    net = getattr(module, class_name)(**{**arguments, 'upscale': 4})
    save_file(net.state_dict(), workdir / 'published.safetensors')
    quick_opt['network_g'] = {'type': 'SpandrelNetwork'}
    quick_opt['path']['pretrain_network_g'] = 'published.safetensors'
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
    for name in ('net_g', 'net_g_adapted'):
        found = ModelLoader().load_from_file(workdir / f'experiments/drtl_x4/models/{name}_latest.pth')
        assert found.architecture.id == 'Compact'
        assert not torch.equal(next(found.model.parameters()), next(net.parameters()))


def refused(content: dict, message: str) -> None:
    torch.save(content, 'w.pth')
    with pytest.raises((DataError, OptionError), match=message):
        load_trained('w.pth')


def test_what_cannot_be_used_is_named(folder):
    from spandrel.architectures.DRUNet import DRUNet
    from spandrel.architectures.MixDehazeNet import MixDehazeNet

    grey = importlib.import_module('spandrel.architectures.DnCNN').DnCNN(nc=8, nb=8, act_mode='R')
    refused(grey.state_dict(), r'--weights: w\.pth: DnCNN maps 1 channels to 1; 3 to 3 are needed')
    noise_map = DRUNet(in_nc=4, out_nc=3, nc=[8, 8, 8, 8], nb=4)
    refused(noise_map.state_dict(), r'--weights: w\.pth: DRUNet cannot restore an RGB image by itself')
    other_range = MixDehazeNet(embed_dims=[8, 16, 8, 16, 8], depths=[1, 1, 1, 1, 1])
    refused(other_range.state_dict(), r'MixDehazeNet returns more than an image, or one of another range')
    refused({'layer.weight': torch.rand(3)}, r'w\.pth does not record its network, and spandrel does not recognise it')
    refused({'epoch': 3}, r'w\.pth contains no weights')


@pytest.mark.parametrize(
    ('network_g', 'message'),
    [
        ({}, r'network_g\.checkpoint is missing'),
        ({'checkpoint': 'none.pth'}, r'network_g\.checkpoint: none\.pth cannot be read'),
        ({'checkpoint': 'other.pth'}, r'network_g\.checkpoint: spandrel does not recognise other\.pth'),
    ],
)
def test_option_files_name_a_checkpoint(workdir, quick_opt, write_opt, capsys, network_g, message):
    torch.save({'layer.weight': torch.rand(3)}, 'other.pth')
    quick_opt['network_g'] = {'type': 'SpandrelNetwork', **network_g}
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_is_imported_only_when_needed():
    code = 'import drtl_plugin, basicsr, sys; drtl_plugin.register(); sys.exit("spandrel" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
