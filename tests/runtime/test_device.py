import types

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from torch import nn

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
