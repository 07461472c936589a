"""Tiles against the whole image."""

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.swinir_arch import SwinIR

from drtl_plugin.runtime.tiles import restore


@pytest.fixture
def net():
    torch.manual_seed(0)
    return EDSR(3, 3, num_feat=8, num_block=2, upscale=2, res_scale=1).eval()


@pytest.mark.parametrize(('tile', 'shape'), [(16, (50, 37)), (7, (20, 33)), (40, (41, 12))])
def test_tiles_make_the_whole_image(net, tile, shape):
    """Six 3 x 3 convolutions on the low-quality grid and two beyond reach less than 8 pixels."""
    lq = torch.rand(2, 3, *shape)
    torch.testing.assert_close(restore(net, lq, 2, tile=tile, overlap=8), restore(net, lq, 2), rtol=1e-5, atol=1e-5)


def test_without_overlap_there_are_seams(net):
    lq = torch.rand(1, 3, 32, 32)
    difference = (restore(net, lq, 2, tile=16, overlap=0) - restore(net, lq, 2)).abs().amax(dim=(0, 1))
    assert difference[:, 28:36].max() > 1e-3
    assert difference[:16, :16].max() < 1e-5


def test_what_the_network_sees_does_not_grow_with_the_image(net):
    seen = []

    def watched(lq):
        seen.append(lq.shape[-2:])
        return net(lq)

    result = restore(watched, torch.rand(1, 3, 90, 200), 2, tile=24, overlap=4)
    assert result.shape == (1, 3, 180, 400)
    assert len(seen) == 4 * 9
    assert all(max(shape) <= 24 + 2 * 4 for shape in seen)


@pytest.mark.parametrize('tile', [0, 12])
def test_windows_are_filled(tile):
    torch.manual_seed(0)
    options = {'upscale': 2, 'img_size': 8, 'window_size': 8, 'depths': [2], 'embed_dim': 12, 'num_heads': [2]}
    net = SwinIR(**options, mlp_ratio=2, upsampler='pixelshuffledirect').eval()
    shapes = []

    def watched(lq):
        shapes.append(lq.shape[-2:])
        return net(lq)

    assert restore(watched, torch.rand(1, 3, 19, 30), 2, window=8, tile=tile, overlap=2).shape == (1, 3, 38, 60)
    assert all(extent % 8 == 0 for shape in shapes for extent in shape)
