"""Auxiliary tasks and the library of an option file."""

import copy
import pickle
from unittest import mock

import pytest
import torch

from drtl_plugin.errors import OptionError
from drtl_plugin.tasks import distortions
from drtl_plugin.tasks import library as library_module
from drtl_plugin.tasks.distortions import DISTORTION_REGISTRY, Drawn, bicubic, distortion
from drtl_plugin.tasks.library import DistortionLibrary, default_library
from drtl_plugin.tasks.random_camera import random_composition
from tests.fetches import watch_fetches
from tests.tasks.test_distortions import smooth_images


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
                kinds = [step.kind.__name__ for step in task.steps if step.kind]
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
    assert [step.kind.__name__ if step.kind else 'bicubic' for step in task.steps] == [
        'gaussian_blur',
        'bicubic',
        'jpeg',
    ]
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
        ([{'name': 'compose', 'steps': [{'name': 'bicubic'}] * 2}], r'bicubic appears more than once'),
        ([{'name': 'compose', 'steps': [{'name': 'random_camera'}]}], r'random_camera is a task of its own'),
        ([{'name': 'random_camera', 'sigma': 1}], r'random_camera takes no parameters'),
        ([{'name': 'bicubic'}] * 2, r"two tasks are labelled 'bicubic'"),
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
    with pytest.raises(ValueError, match='not a multiple of scale 4'):
        task(torch.rand(1, 3, 63, 64), generator)
    with pytest.raises(ValueError, match='too small for a kernel of 21'):
        task(torch.rand(1, 3, 8, 8), generator)
    with pytest.raises(ValueError, match='too small for a radius of 99'):
        distortions.sharpen(torch.rand(1, 3, 16, 16), generator, torch.ones(1), radius=99)


def test_distortions_of_ones_own_are_found_by_name(generator, monkeypatch):
    monkeypatch.setattr(DISTORTION_REGISTRY, '_obj_map', dict(DISTORTION_REGISTRY._obj_map))

    @DISTORTION_REGISTRY.register()
    @distortion(on_gt_grid=False, factor=Drawn((0.5, 0.5), 0, 4))
    def gain(img, generator, factor):
        return img * factor.view(-1, 1, 1, 1)

    task = DistortionLibrary([{'name': 'gain'}], 2).tasks[0]
    assert torch.allclose(task(torch.ones(1, 3, 32, 32), generator), torch.tensor(128 / 255))
    with pytest.raises(AssertionError, match="'gain' was already registered in 'distortion' registry"):
        DISTORTION_REGISTRY.register(gain)
    with pytest.raises(ValueError, match="cannot be named 'bicubic'"):
        distortion(on_gt_grid=True)(bicubic)


class TestRandomCamera:
    @pytest.mark.parametrize('scale', [1, 2, 3, 4])
    def test_is_drawn_for_each_episode(self, scale):
        """Cameras differ, but a generator in the same state draws the same one, with the same noise."""
        task = DistortionLibrary([{'name': 'random_camera'}], scale).tasks[0]
        gt = smooth_images(2, 96)
        first, second, again = (task(gt, torch.Generator().manual_seed(seed)) for seed in (0, 1, 0))
        assert first.shape == (2, 3, 96 // scale, 96 // scale)
        assert torch.equal(first, again)
        assert not torch.allclose(first, second)

    def test_distorts_all_images_of_an_episode_alike(self):
        """The same content twice gives the same image twice, unless the camera has noise."""
        task = DistortionLibrary([{'name': 'random_camera'}], 4).tasks[0]
        gt = smooth_images(1, 96).repeat(2, 1, 1, 1)
        compositions = [random_composition(4, torch.Generator().manual_seed(seed)) for seed in range(40)]
        with mock.patch.object(library_module, 'random_composition', lambda *_: next(drawn)):
            for composition in compositions:
                drawn = iter([composition])
                one, two = task(gt, torch.Generator().manual_seed(0))
                is_noisy = any('noise' in step['name'] for step in composition['steps'])
                assert torch.equal(one, two) != is_noisy

    def test_covers_the_parameter_space(self):
        """Each kind of distortion is part of it as often as its docstring says, within the library's bounds."""
        generator = torch.Generator().manual_seed(0)
        compositions = [random_composition(4, generator)['steps'] for _ in range(1000)]
        names = [[step['name'] for step in steps] for steps in compositions]
        blurs = {'gaussian_blur', 'anisotropic_blur', 'plateau_blur', 'sinc'}
        for kinds, share in (
            (blurs, 0.75),
            ({'gaussian_noise', 'poisson_noise'}, 0.7),
            ({'sharpen'}, 0.3),
            ({'jpeg'}, 0.5),
        ):
            assert sum(bool(kinds & set(some)) for some in names) / 1000 == pytest.approx(share, abs=0.05)
        assert {name for some in names for name in some} == {
            *blurs,
            'gaussian_noise',
            'poisson_noise',
            'sharpen',
            'jpeg',
            'bicubic',
        }
        sigmas = torch.tensor(
            [sum(s['sigma']) / 2 for steps in compositions for s in steps if s['name'] == 'gaussian_blur']
        )
        assert sigmas.min() >= 0.6 and sigmas.max() <= 3.2
        assert sigmas.log().mean().exp().item() == pytest.approx((0.6 * 3.2) ** 0.5, rel=0.1)


def test_libraries_can_be_sent_to_other_processes(generator):
    library = DistortionLibrary('default', 4)
    gt = torch.rand(1, 3, 96, 96, generator=generator)
    for same in (pickle.loads(pickle.dumps(library)), copy.deepcopy(library)):
        assert same.labels == library.labels
        lqs = [task(gt, torch.Generator().manual_seed(0)) for task in (library.tasks[-2], same.tasks[-2])]
        assert torch.equal(*lqs)
