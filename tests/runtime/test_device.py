import argparse
import os
import types

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from basicsr.models.base_model import BaseModel
from torch import nn

from drtl_plugin.data.distortion_task_dataset import DistortionTaskDataset
from drtl_plugin.errors import OptionError
from drtl_plugin.models.episode_synthesis import Episodes
from drtl_plugin.options.parse import parse_options
from drtl_plugin.runtime import device
from drtl_plugin.runtime.device import computes_bfloat16, lay_out, training_format

CPU = torch.device('cpu')


@pytest.mark.parametrize(
    ('capabilities', 'expected'),
    [
        ({'avx2': True, 'avx512_f': True, 'avx512_bf16': False}, False),
        ({'avx512_f': True, 'avx512_bf16': True}, True),
        ({'neon': True, 'bf16': True}, True),
        ({}, False),
    ],
)
def test_bfloat16_is_what_the_processor_has(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: types.MappingProxyType(capabilities), raising=False)
    assert computes_bfloat16(CPU) is expected


@pytest.mark.parametrize('has', [True, False])
def test_bfloat16_of_older_torch(monkeypatch, has):
    monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: has, raising=False)
    assert computes_bfloat16(CPU) is has


@pytest.mark.parametrize(
    ('capability', 'expected'), [('AVX2', torch.contiguous_format), ('AVX512', torch.channels_last)]
)
def test_training_is_laid_out_by_processor(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    assert training_format(CPU) == expected


def test_layouts_change_nothing_but_the_layout():
    torch.manual_seed(0)
    net = EDSR(3, 3, num_feat=8, num_block=2, upscale=2).train()
    lq = torch.rand(1, 3, 12, 12)
    random, before = torch.get_rng_state(), net(lq)
    assert lay_out(net, torch.channels_last) == torch.channels_last
    assert net.training
    assert torch.equal(torch.get_rng_state(), random)
    assert net.conv_last.weight.is_contiguous(memory_format=torch.channels_last)
    assert net(lq).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(lq), before, rtol=1e-4, atol=1e-5)


class Viewing(nn.Module):
    """Views channels and rows as one, as only torch's own layout has them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x):
        return self.conv(x).view(len(x), -1, x.shape[-1])


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv3d(1, 1, 3)

    def forward(self, x):
        return self.second(self.first(x)[:, None])


@pytest.mark.parametrize('kind', [Viewing, Volume])
def test_networks_that_take_no_other_layout_keep_theirs(kind):
    net = kind().eval()
    lq = torch.rand(2, 3, 32, 32)
    expected = net(lq)
    assert lay_out(net, torch.channels_last) == torch.contiguous_format
    assert all(p.is_contiguous() for p in net.parameters())
    assert torch.equal(net(lq), expected)


@pytest.fixture
def no_choice(monkeypatch):
    """Undo what a test chooses."""
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', os.environ.get('CUDA_VISIBLE_DEVICES', '0'))
    yield
    device.choose('auto')


@pytest.mark.parametrize(
    ('name', 'gpus', 'has_mps', 'said'),
    [
        ('cuda', 0, False, '--device cuda: there is no such device; this machine has cpu.'),
        ('cuda:2', 2, False, '--device cuda:2: there is no such device; this machine has cpu, cuda:0, cuda:1.'),
        ('mps', 1, False, '--device mps: there is no such device; this machine has cpu, cuda:0.'),
        ('cuda', 0, True, '--device cuda: there is no such device; this machine has cpu, mps.'),
        ('gpu', 1, True, '--device gpu: expected auto, cpu, cuda, cuda:N or mps.'),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, no_choice, name, gpus, has_mps, said):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: has_mps)
    with pytest.raises(OptionError) as error:
        device.choose(name)
    assert str(error.value) == said


@pytest.mark.parametrize('name', ['cuda', 'cuda:1', 'mps'])
def test_a_device_that_is_there(monkeypatch, no_choice, name):
    taken = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', taken.append)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    device.choose(name)
    assert device.current() == device.chosen() == torch.device(name)
    assert taken == ([torch.device(name)] if name == 'cuda:1' else [])


def test_the_cpu_hides_gpus(no_choice):
    device.choose('cpu')
    assert device.current() == CPU
    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''


@pytest.mark.parametrize(('has_cuda', 'expected'), [(True, 'cuda'), (False, 'cpu')])
def test_auto_takes_a_gpu_of_cuda(monkeypatch, no_choice, has_cuda, expected):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    device.choose('auto')
    assert device.chosen() is None
    assert device.current() == torch.device(expected)


@pytest.mark.parametrize(
    ('name', 'written', 'num_gpu', 'said'),
    [
        ('auto', 'auto', 2, ''),
        ('cpu', 2, 0, '--device cpu: num_gpu 2 becomes 0.\n'),
        ('cpu', 0, 0, ''),
        ('mps', 1, 0, '--device mps: num_gpu 1 becomes 0.\n'),
        ('cuda', 0, 1, '--device cuda: num_gpu 0 becomes 1.\n'),
        ('cuda', 1, 1, ''),
        ('cuda:1', 2, 1, '--device cuda:1: num_gpu 2 becomes 1.\n'),
    ],
)
def test_the_flag_overrides_the_option_file(
    workdir, quick_opt, write_opt, monkeypatch, no_choice, capsys, name, written, num_gpu, said
):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: name != 'cpu')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda chosen: None)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    device.choose(name)
    quick_opt.update(num_gpu=written, model_type='SRModel')
    del quick_opt['drtl'], quick_opt['network_r']
    quick_opt['datasets'] = {'test_1': {'name': 'x', 'type': 'SingleImageDataset', 'dataroot_lq': 'x'}}
    args = argparse.Namespace(opt=write_opt(quick_opt), launcher='none', auto_resume=False, debug=False, force_yml=None)
    assert parse_options(args, str(workdir), is_train=False)['num_gpu'] == num_gpu
    assert capsys.readouterr().err == said


def test_models_compute_on_the_chosen_device(monkeypatch, no_choice):
    """BasicSR's own, too, which know of CUDA and the CPU only."""
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    device.choose('mps')
    assert BaseModel({'num_gpu': 0, 'is_train': False}).device == torch.device('mps')
    device.choose('auto')
    assert BaseModel({'num_gpu': 0, 'is_train': False}).device == CPU


def test_patches_are_made_on_the_cpu_for_devices_without_double_precision(workdir, quick_opt):
    """meta stands for such a device: it refuses to make a generator."""
    train_set = DistortionTaskDataset({**quick_opt['datasets']['train'], 'scale': 4, 'phase': 'train', 'seed': 0})
    episodes = Episodes(train_set, None, torch.device('meta'), 0)
    gt, lq = episodes.auxiliary_pairs(2, *episodes.generators('test', 0))
    assert gt.device == lq.device == torch.device('meta')
    assert episodes.auxiliary_gt(2, torch.Generator()).device == CPU


@pytest.mark.parametrize('newer', [True, False])
def test_bfloat16_on_apple_gpus_needs_macos_14(monkeypatch, newer):
    monkeypatch.setattr(torch.backends.mps, 'is_macos_or_newer', lambda major, minor: newer and major == 14)
    assert computes_bfloat16(torch.device('mps')) is newer
