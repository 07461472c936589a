"""Distortions against those of OpenCV, BasicSR and MATLAB, and against their formulas."""

import math

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import degradations
from basicsr.utils import DiffJPEG, img2tensor
from basicsr.utils.matlab_functions import imresize
from torch.nn import functional as F

from drtl_plugin.tasks import distortions
from drtl_plugin.tasks.distortions import DISTORTION_REGISTRY, bicubic


def smooth_images(num: int, size: int) -> torch.Tensor:
    coarse = torch.rand(num, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=(size, size), mode='bicubic').clamp(0, 1)


def to_cv2(image: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1])


def spread(impulse_response: torch.Tensor) -> tuple[float, float]:
    """Standard deviations of a point's image along x and y."""
    weights = impulse_response / impulse_response.sum()
    axis = torch.arange(len(weights), dtype=torch.float32) - len(weights) // 2
    return tuple(((weights.sum(dim) * axis**2).sum().sqrt().item()) for dim in (0, 1))


@pytest.fixture
def point() -> torch.Tensor:
    image = torch.zeros(1, 3, 63, 63)
    image[..., 31, 31] = 1
    return image


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_bicubic_is_matlabs_imresize_inside(scale):
    image = smooth_images(1, 96)
    expected = imresize(image[0], 1 / scale)
    result = bicubic(image, scale)[0]
    border = 4
    inside = (..., slice(border, -border), slice(border, -border))
    assert torch.allclose(result[inside], expected[inside], atol=1e-5)


@pytest.mark.parametrize('sigma', [0.8, 1.5, 2.5])
def test_gaussian_blur_is_opencvs(sigma, generator):
    image = smooth_images(1, 64)
    result = distortions.gaussian_blur(image, generator, sigma=torch.tensor([sigma]))
    expected = cv2.GaussianBlur(to_cv2(image[0]), (21, 21), sigma, borderType=cv2.BORDER_REFLECT_101)
    assert np.allclose(to_cv2(result[0]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'parameters', 'theirs'),
    [
        ('gaussian_blur', {'sigma': [0.3, 1.3]}, lambda s: degradations.bivariate_Gaussian(21, s, s, 0)),
        (
            'anisotropic_blur',
            {'sigma_x': [0.7, 3.0], 'sigma_y': [2.0, 1.1], 'rotation': [0.4, -2.0]},
            lambda *p: degradations.bivariate_Gaussian(21, *p, isotropic=False),
        ),
        (
            'generalized_blur',
            {'sigma': [0.8, 2.0], 'beta': [0.6, 3.0]},
            lambda s, b: degradations.bivariate_generalized_Gaussian(21, s, s, 0, b),
        ),
        (
            'plateau_blur',
            {'sigma': [0.8, 2.0], 'beta': [1.2, 1.9]},
            lambda s, b: degradations.bivariate_plateau(21, s, s, 0, b),
        ),
        ('sinc', {'cutoff': [0.8, 2.2]}, lambda c: degradations.circular_lowpass_kernel(c, 21)),
    ],
)
@pytest.mark.filterwarnings('ignore:invalid value:RuntimeWarning')  # theirs divides 0 by 0 in the centre
def test_blurs_are_by_basicsrs_kernels(name, parameters, theirs, point, generator):
    drawn = {key: torch.tensor(values) for key, values in parameters.items()}
    result = DISTORTION_REGISTRY.get(name)(point.repeat(2, 1, 1, 1), generator, **drawn)
    for i, values in enumerate(zip(*parameters.values(), strict=True)):
        # Correlation, not convolution: a point's image is the kernel turned by 180°.
        expected = torch.from_numpy(theirs(*values)).float().flip(0, 1)
        assert torch.allclose(result[i, 0, 21:42, 21:42], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('quality', [12.0, 50.0, 93.0])
def test_jpeg_is_basicsrs(quality, generator):
    img = torch.rand(2, 3, 32, 48, generator=generator)
    expected = DiffJPEG(differentiable=False)(img, quality=torch.tensor([quality, 70.0]))
    assert torch.equal(distortions.jpeg(img, generator, quality=torch.tensor([quality, 70.0])), expected)


def test_each_image_gets_its_own_blur(point, generator):
    result = distortions.gaussian_blur(point.repeat(2, 1, 1, 1), generator, sigma=torch.tensor([1.0, 3.0]))
    assert spread(result[0, 0])[0] == pytest.approx(1, abs=0.02)
    assert spread(result[1, 0])[0] == pytest.approx(3, abs=0.06)


def test_anisotropic_blur_is_as_wide_as_asked_along_its_axes(point, generator):
    sigma_x, sigma_y = torch.tensor([1.0]), torch.tensor([3.0])
    upright = distortions.anisotropic_blur(point, generator, sigma_x, sigma_y, torch.tensor([0.0]))
    turned = distortions.anisotropic_blur(point, generator, sigma_x, sigma_y, torch.tensor([math.pi / 2]))
    assert spread(upright[0, 0]) == pytest.approx((1, 3), abs=0.06)
    assert spread(turned[0, 0]) == pytest.approx((3, 1), abs=0.06)


def test_generalized_blur_of_beta_1_is_gaussian(point, generator):
    sigma, beta = torch.tensor([2.0]), torch.tensor([1.0])
    generalized = distortions.generalized_blur(point, generator, sigma, beta)
    assert torch.allclose(generalized, distortions.gaussian_blur(point, generator, sigma), atol=1e-6)


def test_plateau_blur_follows_its_formula(point, generator):
    sigma, beta = 2.0, 1.5
    result = distortions.plateau_blur(point, generator, torch.tensor([sigma]), torch.tensor([beta]))[0, 0]
    # 1 / (1 + (r²/σ²)^β): ratio of the values at distances 0 and 2
    assert result[31, 31] / result[31, 33] == pytest.approx(1 + (4 / sigma**2) ** beta, rel=1e-4)


def test_sinc_removes_what_lies_above_the_cutoff(generator):
    axis = torch.arange(64, dtype=torch.float32)
    waves = [0.5 + 0.4 * torch.cos(frequency * axis).expand(1, 3, 64, 64) for frequency in (0.25, 2.5)]
    low, high = (distortions.sinc(wave, generator, cutoff=torch.tensor([1.2]))[..., 20:44, 20:44] for wave in waves)
    assert low.std() > 0.9 * waves[0][..., 20:44, 20:44].std()
    assert high.std() < 0.1 * waves[1].std()


def test_gaussian_noise_has_its_sigma_in_each_image_and_channel(generator):
    flat = torch.full((2, 3, 128, 128), 0.5)
    noise = distortions.gaussian_noise(flat, generator, sigma=torch.tensor([5.0, 20.0])) - flat
    assert noise[0].std(dim=(1, 2)).mul(255).tolist() == pytest.approx([5] * 3, rel=0.03)
    assert noise[1].std(dim=(1, 2)).mul(255).tolist() == pytest.approx([20] * 3, rel=0.03)
    assert noise.mean().abs() < 1e-3
    channels = noise[1].flatten(1)
    assert torch.corrcoef(channels)[0, 1].abs() < 0.03


def test_poisson_noise_grows_with_the_root_of_intensity(generator):
    image = torch.stack([torch.full((3, 128, 128), level) for level in (0.1, 0.4)])
    noise = distortions.poisson_noise(image, generator, strength=torch.tensor([2.0, 2.0])) - image
    # variance = strength² · img / 255
    expected = [2 * math.sqrt(level / 255) for level in (0.1, 0.4)]
    assert noise.std(dim=(1, 2, 3)).tolist() == pytest.approx(expected, rel=0.03)
    assert noise.mean().abs() < 1e-3


@pytest.mark.parametrize('quality', [30, 75])
@pytest.mark.parametrize('size', [96, 90])
def test_jpeg_does_the_damage_of_opencvs(quality, size, generator, sample_root):
    photograph = cv2.imread(str(sample_root / 'camera/support/gt/1_astronaut.png'))[:size, :size]
    image = img2tensor(photograph / 255)[None]
    result = to_cv2(distortions.jpeg(image, generator, quality=torch.tensor([float(quality)]))[0]) * 255
    encoded = cv2.imencode('.jpg', photograph, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    expected = cv2.imdecode(encoded, cv2.IMREAD_COLOR).astype(float)
    damage = np.abs(expected - photograph).mean()
    assert np.abs(result - photograph).mean() == pytest.approx(damage, rel=0.1)
    # The same damage, not only as much of it; encoders differ in how they enlarge the chroma.
    assert np.abs(result - expected).mean() < 0.75 * damage


def test_jpeg_of_the_best_quality_changes_next_to_nothing(generator):
    img = torch.rand(1, 3, 16, 16, generator=generator) / 4 + 0.3
    # Colour is halved in resolution whatever the quality; without colour, grey levels round.
    grey = img.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    assert (distortions.jpeg(grey, generator, torch.tensor([100.0])) - grey).abs().max() < 2 / 255


def test_jpeg_leaves_its_quality_tensor_alone(generator):
    quality = torch.tensor([50.0])
    distortions.jpeg(torch.rand(1, 3, 16, 16), generator, quality=quality)
    assert quality.item() == 50


def test_sharpen_overshoots_at_edges_and_leaves_flats(generator):
    edge = torch.full((1, 3, 32, 32), 0.3)
    edge[..., 16:] = 0.7
    result = distortions.sharpen(edge, generator, weight=torch.tensor([1.0]))
    assert result[..., 16].min() > 0.75
    assert result[..., 15].max() < 0.25
    assert torch.allclose(result[..., :8], edge[..., :8], atol=1e-6)
