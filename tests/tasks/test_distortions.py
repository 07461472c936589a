import math

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import degradations
from basicsr.utils import DiffJPEG, img2tensor
from basicsr.utils.matlab_functions import imresize
from torch.nn import functional as F

from drtl_plugin.errors import OptionError
from drtl_plugin.tasks import distortions
from drtl_plugin.tasks.distortions import DISTORTIONS, DistortionLibrary, Drawn, bicubic, default_library, distortion
from tests.fetches import watch_fetches


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
    result = DISTORTIONS[name].function(point.repeat(2, 1, 1, 1), generator, **drawn)
    for i, values in enumerate(zip(*parameters.values())):
        # Correlation, not convolution: a point's image is the kernel turned by 180°.
        expected = torch.from_numpy(theirs(*values)).float().flip(0, 1)
        assert torch.allclose(result[i, 0, 21:42, 21:42], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('quality', [12.0, 50.0, 93.0])
def test_jpeg_is_basicsrs(quality, generator):
    img = torch.rand(2, 3, 32, 48, generator=generator)
    expected = DiffJPEG(differentiable=False)(img, quality=torch.tensor([quality, 70.0]))
    assert torch.equal(distortions.jpeg(img, generator, quality=torch.tensor([quality, 70.0])), expected)


def test_nothing_waits_for_the_device(generator):
    """Fetching a number from a GPU is waiting for all that it has to do."""
    library = DistortionLibrary('default', 4)
    img = torch.rand(2, 3, 96, 96, generator=generator)
    with watch_fetches() as fetched:
        for task in library.tasks:
            task(img, generator)
    assert not fetched


@pytest.mark.parametrize(
    'fetch',
    [
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.sum().item(),
        lambda x: bool(x.max() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
    ],
)
def test_it_would_be_seen(fetch):
    with watch_fetches() as fetched:
        fetch(torch.rand(3))
    assert fetched


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
    assert (DISTORTIONS['jpeg'].function(grey, generator, torch.tensor([100.0])) - grey).abs().max() < 2 / 255


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


@pytest.mark.parametrize('scale', [1, 2, 3, 4, 8])
def test_default_library_gives_valid_pictures(scale, generator):
    library = DistortionLibrary('default', scale)
    gt = smooth_images(2, 96)
    for task in library.tasks:
        lq = task(gt, generator)
        assert lq.shape == (2, 3, 96 // scale, 96 // scale)
        assert lq.min() >= 0 and lq.max() <= 1
        assert torch.allclose((lq * 255).round() / 255, lq)  # 8 bits, as a file


def test_default_library_covers_the_plane_evenly():
    """Blur and noise as measured on what the tasks make of a point and of a flat image."""
    tasks = {task.label: task for task in DistortionLibrary(default_library(4), 4).tasks}
    assert len(tasks) >= 12
    point = torch.zeros(32, 3, 128, 128)
    point[..., 60:64, 60:64] = 1  # a pixel of the low-quality grid
    flat = torch.full((32, 3, 128, 128), 0.5)
    peaks = []
    for blur in ('sharp', 'soft', 'blurred'):
        peaks.append(tasks[f'{blur} clean raw'](point, torch.Generator().manual_seed(0))[..., 15, 15].mean().item())
        for noise in ('clean', 'noisy'):
            for compression in ('raw', 'jpeg'):
                task = tasks[f'{blur} {noise} {compression}']
                grain = task(flat, torch.Generator().manual_seed(0)).std() * 255
                assert (grain > 3) == (noise == 'noisy')
                kinds = [step.kind.name for step in task.steps if step.kind]
                assert ('jpeg' in kinds) == (compression == 'jpeg')
    assert peaks[0] > 1.2 * peaks[1] > 1.2 * 1.5 * peaks[2]


def test_tasks_are_a_function_of_the_generators_state():
    gt = smooth_images(4, 64)
    task = DistortionLibrary([{'name': 'gaussian_noise'}], 4).tasks[0]
    first, again, other = (task(gt, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_compositions_act_in_order(generator):
    blur, noise = {'name': 'gaussian_blur', 'sigma': 3}, {'name': 'gaussian_noise', 'sigma': 20}
    flat = torch.full((1, 3, 128, 128), 0.5)
    compositions = [
        {'name': 'compose', 'steps': [blur, noise]},
        {'name': 'compose', 'steps': [noise, blur, {'name': 'bicubic'}]},
    ]
    blur_first, noise_first = DistortionLibrary(compositions, 2).tasks
    assert blur_first(flat, generator).std() * 255 == pytest.approx(20, rel=0.05)
    assert noise_first(flat, generator).std() * 255 < 3


def test_reduction_stands_between_blur_and_noise_unless_named():
    steps = [{'name': 'gaussian_blur'}, {'name': 'jpeg'}]
    task = DistortionLibrary([{'name': 'compose', 'steps': steps}], 2).tasks[0]
    assert [step.kind.name if step.kind else 'bicubic' for step in task.steps] == ['gaussian_blur', 'bicubic', 'jpeg']
    assert task.label == 'gaussian_blur(sigma 0.6-2) + jpeg(quality 40-90)'


@pytest.mark.parametrize(
    ('entries', 'message'),
    [
        (
            [{'name': 'gausian_blur'}],
            r"\[0\]: unknown distortion 'gausian_blur'; did you mean 'gaussian_blur'",
        ),
        (
            [{'name': 'jpeg', 'qualty': 3}],
            r"\[0\]: unknown parameter of jpeg 'qualty'; did you mean 'quality'",
        ),
        ([{'name': 'jpeg', 'quality': [90, 50]}], r'quality: \[90, 50\] must be a range within \[1, 100\]'),
        ([{'name': 'jpeg', 'quality': [0, 50]}], r'quality: \[0, 50\] must be a range'),
        ([{'name': 'jpeg', 'quality': 'good'}], r"quality: expected a number or \[low, high\], got 'good'"),
        ([{'name': 'gaussian_blur', 'kernel_size': 4}], r'kernel_size: expected an odd whole number'),
        ([{'name': 'compose'}], r'compose takes steps'),
        ([{'name': 'compose', 'steps': [{'name': 'bicubic'}] * 2}], r'bicubic stands more than once'),
        ([{'name': 'bicubic'}] * 2, r"two tasks are both 'bicubic'"),
        ([], r"expected 'default' or a list"),
        ('all', r"expected 'default' or a list"),
        (['jpeg'], r'expected a section with a name'),
    ],
)
def test_wrong_distortions_are_named(entries, message):
    with pytest.raises(OptionError, match=message):
        DistortionLibrary(entries, 4)


def test_sizes_that_do_not_fit_are_refused(generator):
    task = DistortionLibrary([{'name': 'gaussian_blur'}], 4).tasks[0]
    with pytest.raises(ValueError, match='no multiple of the scale 4'):
        task(torch.rand(1, 3, 63, 64), generator)
    with pytest.raises(ValueError, match='too small for a kernel of 21'):
        task(torch.rand(1, 3, 8, 8), generator)
    with pytest.raises(ValueError, match='too small for a radius of 99'):
        distortions.sharpen(torch.rand(1, 3, 16, 16), generator, torch.ones(1), radius=99)


def test_distortions_of_ones_own_are_found_by_name(generator, monkeypatch):
    monkeypatch.setattr(distortions, 'DISTORTIONS', dict(DISTORTIONS))

    @distortion(on_gt_grid=False, factor=Drawn((0.5, 0.5), 0, 4))
    def gain(img, generator, factor):
        return img * factor.view(-1, 1, 1, 1)

    task = DistortionLibrary([{'name': 'gain'}], 2).tasks[0]
    assert torch.allclose(task(torch.ones(1, 3, 32, 32), generator), torch.tensor(128 / 255))
    with pytest.raises(ValueError, match='exists already'):
        distortion(on_gt_grid=True)(gain)
