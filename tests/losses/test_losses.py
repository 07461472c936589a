"""The losses against formulas of their own, written with NumPy and SciPy."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from basicsr.losses import build_loss
from basicsr.losses.basic_loss import PerceptualLoss
from scipy.ndimage import gaussian_filter
from torch import nn
from torchvision.models import vgg

from drtl_plugin.errors import DataError, OptionError

EXPONENTS = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])


def images(side: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gt = torch.rand(2, 3, side, side, generator=generator)
    return (gt + 0.2 * torch.randn(gt.shape, generator=generator)).clamp(0, 1), gt


def similarity(x: np.ndarray, y: np.ndarray, scales: int) -> float:
    """MS-SSIM of two ``(C, H, W)`` whose factors s are taken as (1 + s) / 2."""

    def blur(image):
        return gaussian_filter(image, 1.5, radius=5, axes=(1, 2), mode='mirror')

    result, exponents = 1, EXPONENTS[:scales] / EXPONENTS[:scales].sum()
    for scale, exponent in enumerate(exponents):
        mx, my = blur(x), blur(y)
        contrast = (2 * (blur(x * y) - mx * my) + 0.03**2) / (blur(x * x) - mx**2 + blur(y * y) - my**2 + 0.03**2)
        if scale == scales - 1:
            value = (contrast * (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)).mean()
        else:
            value = contrast[:, 5:-5, 5:-5].mean()
        result *= ((1 + value) / 2) ** exponent
        x, y = (image.reshape(3, len(image[0]) // 2, 2, -1, 2).mean((2, 4)) for image in (x, y))
    return result


@pytest.mark.parametrize('side, scales', [(192, 5), (128, 4), (96, 3), (16, 1)])
def test_msssim(side, scales):
    x, y = images(side)
    loss = build_loss({'type': 'MSSSIMLoss', 'loss_weight': 0.5})
    expected = np.mean(
        [0.5 * (1 - similarity(a, b, scales)) for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True)]
    )
    assert loss(x, y).item() == pytest.approx(expected, abs=2e-5)
    assert loss(y, y).item() == pytest.approx(0, abs=1e-6)


def test_msssim_has_a_gradient_for_images_that_have_nothing_in_common():
    """Where similarities are negative, their powers would be no numbers."""
    x = images(96)[0].requires_grad_()
    build_loss({'type': 'MSSSIMLoss'})(x, 1 - x.detach()).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_msssim_of_tiny_patches():
    with pytest.raises(ValueError, match='at least 11 pixels a side, not 8'):
        build_loss({'type': 'MSSSIMLoss'})(*images(8))


def test_frequency():
    x, y = images(24)
    spectrum = np.fft.rfft2((x - y).double().numpy()) / 24
    expected = 2 * np.mean([np.abs(spectrum.real), np.abs(spectrum.imag)])
    loss = build_loss({'type': 'FFTLoss', 'loss_weight': 2.0})
    assert loss(x, y).item() == pytest.approx(expected, rel=1e-5)
    noise = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    sides = [loss(noise[..., :side, :side], torch.zeros(1, 3, side, side)).item() for side in (24, 96)]
    assert sides[0] == pytest.approx(sides[1], rel=0.1)  # whatever the size of the patch


@pytest.fixture(scope='module')
def vgg_weights(tmp_path_factory) -> str:
    """torchvision's names and shapes of VGG11's convolutions, and noise."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('vgg') / 'vgg11.pth'
    features = vgg.make_layers(vgg.cfgs['A'])
    torch.save({f'features.{name}': weight for name, weight in features.state_dict().items()}, path)
    return str(path)


class TestPerceptual:
    OPTIONS: ClassVar[dict] = {
        'type': 'VGGPerceptualLoss',
        'vgg_type': 'vgg11',
        'layer_weights': {'conv1_1': 0.5, 'conv3_2': 1.0},
    }

    def test_it_compares_features(self, vgg_weights):
        loss = build_loss({**self.OPTIONS, 'vgg_weights': vgg_weights, 'perceptual_weight': 2.0})
        assert isinstance(loss, PerceptualLoss) and not any(p.requires_grad for p in loss.parameters())
        features = vgg.make_layers(vgg.cfgs['A'])
        weights = torch.load(vgg_weights, weights_only=True)
        features.load_state_dict({name.removeprefix('features.'): weight for name, weight in weights.items()})
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        x, y = images(32)
        expected = 0
        for number, weight in ((1, 0.5), (9, 1.0)):  # layers up to conv1_1 and to conv3_2
            a, b = (features[:number]((image - mean) / std) for image in (x, y))
            expected += weight * nn.functional.l1_loss(a, b)
        assert loss(x, y)[0].item() == pytest.approx(2 * expected.item(), rel=1e-5)
        assert loss(x, y)[1] is None
        assert build_loss({**self.OPTIONS, 'vgg_weights': vgg_weights, 'style_weight': 1.0})(x, y)[1] > 0

    @pytest.mark.parametrize(
        'options, error, message',
        [
            ({'vgg_weights': 'none.pth'}, DataError, r'vgg_weights: none\.pth cannot be read \(No such file'),
            ({'vgg_type': 'vgg13'}, DataError, "does not hold torchvision's weights of vgg13"),
            ({'vgg_type': 'vgg99'}, OptionError, r"vgg_type: unknown network 'vgg99'"),
            ({'layer_weights': {'conv9_9': 1.0}}, OptionError, r"layer_weights: unknown layer of vgg11 'conv9_9'"),
            ({'criterion': 'l2'}, OptionError, r"criterion: unknown criterion 'l2'"),
        ],
    )
    def test_what_it_cannot_use(self, vgg_weights, options, error, message):
        with pytest.raises(error, match=message):
            build_loss({**self.OPTIONS, 'vgg_weights': vgg_weights, **options})
