"""Cameras that are known, fitted to pairs that they made of scikit-image's photographs."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import scipy.ndimage
import skimage
import torch

from drtl_plugin.errors import DataError
from drtl_plugin.runtime import checkpoints
from drtl_plugin.tasks.camera_fit import CameraFit, fit_camera
from drtl_plugin.tasks.camera_fit import correction as camera_correction
from drtl_plugin.tasks.camera_fit.kernel import kernel_sigma, reduce_by
from drtl_plugin.tasks.camera_fit.noise import fit_noise, synthesise_noise
from drtl_plugin.tasks.distortions import bicubic

SIDE = 240


def photographs() -> list[np.ndarray]:
    """``(240, 240, 3)`` in [0, 1], of four scenes."""
    names = ('astronaut', 'chelsea', 'coffee', 'rocket')
    return [getattr(skimage.data, name)()[40 : 40 + SIDE, 100 : 100 + SIDE] / 255 for name in names]


def tensor(img: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(img.transpose(2, 0, 1)))


def reduced(img: np.ndarray, sigma: float) -> np.ndarray:
    """Reduced three times by a Gaussian of ``sigma`` pixels: the middle of each 3 x 3 pixels."""
    return cv2.GaussianBlur(img, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)[1::3, 1::3]


def pair(lq: np.ndarray, gt: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple((tensor(img) * 255).round().clamp(0, 255).byte() for img in (lq, gt))


@pytest.fixture(autouse=True)
def brief_correction(monkeypatch):
    """What a correction learns is the matter of test_camera_correction.py."""
    monkeypatch.setattr(camera_correction, '_STEPS', 60)


@pytest.fixture(scope='module')
def sharp() -> torch.Tensor:
    return torch.stack([tensor(img) for img in photographs()])


@pytest.fixture(scope='module')
def noise() -> np.random.Generator:
    return np.random.default_rng(0)


def fit(lqs: list[np.ndarray], sharp: torch.Tensor, gts: list[np.ndarray] | None = None) -> CameraFit:
    return fit_camera([pair(lq, gt) for lq, gt in zip(lqs, (gts or photographs())[: len(lqs)], strict=True)], sharp)


def test_a_known_kernel_is_recovered(sharp):
    fitted = fit([reduced(img, 1.6) for img in photographs()], sharp)
    size = fitted.kernel.shape[-1]
    axis = cv2.getGaussianKernel(size, 1.6)[:, 0]
    known = torch.from_numpy(np.outer(axis, axis)).float()
    assert size % 2 == 1
    for kernel in fitted.kernel:
        assert (kernel - known).norm() / known.norm() < 0.05
        assert kernel_sigma(kernel) == pytest.approx(1.6, rel=0.05)
    assert fitted.explained > 0.9 and fitted.explained_left_out > 0.9
    assert fitted.warnings() == []


def test_shifts_are_recovered_whatever_the_exposures(sharp):
    moves = np.array([[0.7, -0.4], [-0.5, 0.9], [0.1, -0.2], [-0.3, -0.3]])
    gains, offsets = (1.0, 0.9, 0.95, 0.85), (0.0, 0.05, 0.02, 0.04)
    lqs = []
    for img, move, gain, offset in zip(photographs(), moves, gains, offsets, strict=True):
        moved = scipy.ndimage.shift(img, (*move, 0), order=5, mode='reflect')
        lqs.append(gain * reduced(moved, 1.6) + offset)
    fitted = fit(lqs, sharp)
    torch.testing.assert_close(fitted.shift, torch.tensor(moves - moves.mean(axis=0)).float(), atol=0.1, rtol=0)
    assert [kernel_sigma(kernel) for kernel in fitted.kernel] == pytest.approx([1.6] * 3, rel=0.1)


def test_a_tone_curve_is_recovered(sharp, generator):
    fitted = fit([0.1 + 0.8 * reduced(img, 1.6) ** 0.8 for img in photographs()], sharp)
    for level in (0.1, 0.3, 0.5, 0.7, 0.9):
        made = fitted(torch.full((1, 3, 60, 60), level), generator)
        assert made.mean().item() == pytest.approx(0.1 + 0.8 * level**0.8, abs=0.015)


def test_noise_is_recovered_and_made_again(sharp, noise, generator):
    constant, shot = 1e-4, 6e-4
    clean = [reduced(img, 1.6) for img in photographs()]
    spread = [np.sqrt(constant + shot * img.mean(axis=2, keepdims=True)) for img in clean]
    fitted = fit([img + s * noise.standard_normal(img.shape) for img, s in zip(clean, spread, strict=True)], sharp)
    torch.testing.assert_close(fitted.noise[:, 1], torch.full((3,), shot), rtol=0.25, atol=0)
    variance = fitted.noise[:, 0] + 0.4 * fitted.noise[:, 1]
    torch.testing.assert_close(variance, torch.full((3,), constant + 0.4 * shot), rtol=0.1, atol=0)
    assert fitted.neighbour_correlation == pytest.approx(0, abs=0.05)
    grey = torch.full((8, 3, SIDE, SIDE), 0.4)
    assert fitted(grey, generator).std().item() == pytest.approx((constant + 0.4 * shot) ** 0.5, rel=0.1)


def test_noise_at_edges_is_recovered_and_made_again(noise, generator):
    constant, edges = 4e-5, 0.04
    models, lqs = [], []
    for img in photographs():
        clean = reduced(img, 1.6)
        down, right = np.gradient(clean.mean(axis=2))
        spread = np.sqrt(constant + edges * (down**2 + right**2))[..., None]
        models.append(tensor(clean))
        lqs.append(tensor(clean + spread * noise.standard_normal(clean.shape)))
    coefficients, colours, neighbours = fit_noise(models, lqs)
    torch.testing.assert_close(coefficients[:, 2], torch.full((3,), edges).double(), rtol=0.2, atol=0)
    # A grating of 16 pixels is steepest in columns 0 and 8, and flat in columns 4 and 12.
    grating = (0.5 + 0.3 * torch.sin(2 * torch.pi * torch.arange(80) / 16)).expand(8, 3, 80, 80)
    made = synthesise_noise(grating, coefficients.float(), colours.float(), neighbours, generator)
    variance = made.square().mean(dim=(0, 1, 2)).view(5, 16)[1:-1].mean(dim=0)
    slope = 0.3 * 2 * np.pi / 16
    assert variance[[0, 8]].mean().item() == pytest.approx(constant + edges * slope**2, rel=0.25)
    assert variance[[4, 12]].mean().item() == pytest.approx(constant, rel=0.25)


def test_correlated_noise_is_recovered_and_made_again(sharp, noise, generator):
    lqs = []
    for img in photographs():
        white = noise.standard_normal((*img[::3, ::3].shape[:2], 1)).repeat(3, axis=2)  # the same in all colours
        lqs.append(reduced(img, 1.6) + 0.02 * cv2.GaussianBlur(white, (3, 3), 0.6))
    fitted = fit(lqs, sharp)
    tap = cv2.getGaussianKernel(3, 0.6)[:, 0]
    expected = 2 * tap[0] * tap[1] / (tap**2).sum()
    assert fitted.neighbour_correlation == pytest.approx(expected, abs=0.06)
    assert fitted.colour_correlation[0, 1] > 0.9
    made = fitted(torch.full((4, 3, SIDE, SIDE), 0.5), generator).double()
    made = made - made.mean(dim=(2, 3), keepdim=True)
    again = (made[..., 1:] * made[..., :-1]).mean() / made.square().mean()
    assert again.item() == pytest.approx(expected, abs=0.08)
    assert torch.corrcoef(made.transpose(0, 1).flatten(1))[0, 1] > 0.85


def test_softness_of_the_ground_truth_is_recovered(sharp):
    soft = [cv2.GaussianBlur(img, (0, 0), 0.9) for img in photographs()]
    fitted = fit([reduced(img, 1.6) for img in soft], sharp, soft)
    assert fitted.gt_sigma == pytest.approx(0.9, rel=0.1)
    softened = fitted.ground_truth(sharp)
    torch.testing.assert_close(softened, torch.stack([tensor(img) for img in soft]), atol=0.03, rtol=0)
    assert fit([reduced(img, 1.6) for img in photographs()], sharp).gt_sigma == pytest.approx(0, abs=0.1)


def test_it_degrades_as_the_camera_did(sharp, generator):
    fitted = fit([reduced(img, 1.6) for img in photographs()], sharp)
    other = skimage.data.camera()[100:196, 100:196, None].repeat(3, axis=2) / 255
    lq = fitted(tensor(other)[None].float(), generator)
    assert lq.shape == (1, 3, 32, 32)
    inner = slice(3, -3)
    difference = lq[0, :, inner, inner] - tensor(reduced(other, 1.6)).float()[:, inner, inner]
    assert difference.abs().max() < 0.03


def test_pairs_that_cannot_be_trusted_are_named(sharp, noise):
    one = fit([reduced(photographs()[0], 1.6)], sharp)
    assert 'single pair' in one.warnings()[0]
    plain = [bicubic(tensor(img)[None], 3)[0].numpy().transpose(1, 2, 0) for img in photographs()]
    noisy = fit([img + 0.03 * noise.standard_normal(img.shape) for img in plain], sharp)
    assert 'on left-out pairs' in noisy.warnings()[0]
    apart = [np.roll(reduced(img, 1.6), shift, axis=1) for img, shift in zip(photographs(), (-3, 3, 0, 0), strict=True)]
    assert any('align them better' in reason for reason in fit(apart, sharp).warnings())


def test_pairs_too_small_are_an_error(sharp):
    with pytest.raises(DataError, match='at least 60 pixels'):
        fit_camera([pair(np.zeros((16, 16, 3)), np.zeros((48, 48, 3)))], sharp)


def test_black_pairs_are_an_error_and_a_black_one_among_others_is_not(sharp):
    black = np.zeros((SIDE, SIDE, 3))
    with pytest.raises(DataError, match='images are black in'):
        fit([reduced(black, 1.6)] * 2, sharp, gts=[black] * 2)
    img = photographs()[0]
    fitted = fit([reduced(img, 1.6), reduced(black, 1.6)], sharp, gts=[img, black])
    assert all(parameter.isfinite().all() for parameter in (fitted.kernel, fitted.tone, fitted.shift, fitted.noise))


@pytest.mark.parametrize('num', [1, 2])
def test_a_channel_that_is_black_in_all_lq_images_is_named(sharp, num):
    lqs = [reduced(img, 1.6) * (1, 1, 0) for img in photographs()[:num]]
    with pytest.raises(DataError, match='all LQ images are black in blue'):
        fit(lqs, sharp)
    gts = [img * (0, 1, 0) for img in photographs()[:num]]
    with pytest.raises(DataError, match='all GT images are black in red, blue'):
        fit([reduced(img, 1.6) for img in photographs()[:num]], sharp, gts)


def test_a_channel_that_is_black_in_one_lq_image_is_fitted_from_the_others(sharp):
    lqs = [reduced(img, 1.6) for img in photographs()]
    lqs[1] = lqs[1] * (1, 1, 0)
    fitted = fit(lqs, sharp)
    assert all(parameter.isfinite().all() for parameter in (fitted.kernel, fitted.tone, fitted.shift, fitted.noise))
    assert fitted.kernel.sum(dim=(1, 2)).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert fitted.kernel.abs().max() < 1


@pytest.mark.slow
def test_threads_that_were_set_by_hand_do_not_matter(sharp, tmp_path):
    """A general solver of MKL's is broken after ``torch.set_num_threads``: it complains and never ends."""
    program = (
        'import sys, drtl_plugin, torch; torch.set_num_threads(2); '
        'from drtl_plugin.tasks.camera_fit import fit_camera; '
        'print(fit_camera(*torch.load(sys.argv[1])).explained)'
    )
    pairs = [pair(reduced(img, 1.6), img) for img in photographs()[:2]]
    torch.save((pairs, sharp), tmp_path / 'pairs.pth')
    command = [sys.executable, '-c', program, str(tmp_path / 'pairs.pth')]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert float(done.stdout) > 0.9


def test_its_state_restores_it(sharp, tmp_path, generator):
    fitted = fit([reduced(img, 1.6) for img in photographs()], sharp)
    checkpoints.save(fitted.state(), tmp_path / 'camera_fit.pth')
    loaded = CameraFit.from_state(checkpoints.read(tmp_path / 'camera_fit.pth', 'fit'))
    state = generator.get_state()
    first = fitted(sharp.float(), generator)
    generator.set_state(state)
    assert torch.equal(loaded(sharp.float(), generator), first)
    assert (tmp_path / 'camera_fit.pth').stat().st_size < 50_000


@pytest.mark.parametrize('state', [None, {}, {'scale': 4}, {'params': {'weight': torch.zeros(1)}}])
def test_other_states_are_refused(state):
    with pytest.raises(ValueError, match='not the state of a camera fit'):
        CameraFit.from_state(state)


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_reduction_is_centred_like_bicubic_reduction(scale, sharp):
    """A box of the scale's size averages the pixels that a low-quality pixel covers."""
    size = scale + 2 * (4 // 2)
    kernel = torch.zeros(3, size, size, dtype=torch.float64)
    kernel[:, 2:-2, 2:-2] = 1 / scale**2
    expected = torch.nn.functional.avg_pool2d(sharp, scale)
    torch.testing.assert_close(reduce_by(sharp, kernel, scale), expected)
