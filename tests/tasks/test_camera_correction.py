"""Corrections of cameras whose fault is known."""

import pytest
import torch
from torch.nn import functional as F

from drtl_plugin.tasks.camera_fit import CameraFit, fit_camera
from drtl_plugin.tasks.camera_fit import correction as camera_correction
from drtl_plugin.tasks.camera_fit.correction import correct, fit_correction, share_left, train_correction
from tests.tasks.test_camera_fit import pair, photographs, reduced, tensor


@pytest.fixture(scope='module')
def sharp() -> torch.Tensor:
    return torch.stack([tensor(img) for img in photographs()])


def example(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ground truth, its average over 2 x 2 pixels, and half way from there to their maximum, which is no kernel."""
    gt = torch.rand(3, 96, 96, generator=generator)
    model = F.avg_pool2d(gt, 2)
    return gt, model, (model + F.max_pool2d(gt, 2)) / 2


@pytest.mark.slow
def test_what_no_kernel_can_do_is_learned_from_other_scenes(generator):
    seen, unseen = [example(generator) for _ in range(2)], [example(generator)]
    correction = train_correction(seen, torch.Generator().manual_seed(0))
    assert share_left(correction, unseen) < 0.25
    again = train_correction(seen, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(correction, again, strict=True))


@pytest.mark.slow
def test_it_is_used_and_saved_with_the_fit(sharp, tmp_path, generator):
    fitted = fit_camera([pair(reduced(img, 1.6), img) for img in photographs()], sharp)
    gt = sharp[:, :, :96, :96].float()
    bias = torch.tensor([0.1, 0.0, 0.0])
    zeros = (torch.zeros(4, 30, 3, 3), torch.zeros(4), torch.zeros(3, 4, 3, 3), bias)
    plain, corrected = (CameraFit(**{**vars(fitted), 'noise': torch.zeros(3, 3), 'correction': c}) for c in ((), zeros))
    difference = corrected(gt, generator) - plain(gt, generator)
    inside = (plain(gt, generator) < 0.85).all(dim=1, keepdim=True).expand_as(difference)
    assert torch.allclose(difference[:, 0][inside[:, 0]], torch.tensor(0.1), atol=1.01 / 255)
    assert difference[:, 1:].abs().max() <= 1 / 255
    torch.save(corrected.state(), tmp_path / 'fit.pth')
    loaded = CameraFit.from_state(torch.load(tmp_path / 'fit.pth'))
    assert all(torch.equal(a, b) for a, b in zip(loaded.correction, zeros, strict=True))


def test_a_camera_that_a_kernel_describes_is_not_corrected(sharp):
    assert fit_camera([pair(reduced(img, 1.6), img) for img in photographs()], sharp).correction == ()


@pytest.mark.parametrize(('brightness', 'error', 'is_used'), [(0.7, -0.05, False), (0.0, 0.05, True)])
def test_it_is_used_only_if_it_helps_a_pair_that_it_was_not_trained_on(
    generator, monkeypatch, brightness, error, is_used
):
    """The LQ of a dark pair is too bright; the opposite of a bright pair can be learned only from that pair."""
    monkeypatch.setattr(camera_correction, '_STEPS', 60)
    gts = [level + 0.3 * torch.rand(3, 40, 40, generator=generator) for level in (0.0, brightness)]
    models = [F.avg_pool2d(gt, 2) for gt in gts]
    lqs = [model + difference for model, difference in zip(models, (0.05, error), strict=True)]
    correction, left, left_of_unseen = fit_correction(gts, models, lqs)
    if is_used:
        assert max(left, left_of_unseen) < 0.5
        assert share_left(correction, list(zip(gts, models, lqs, strict=True))) == pytest.approx(left)
    else:
        assert (correction, left, left_of_unseen) == ((), 1, 1)


def test_share_left_is_one_without(generator):
    gt, model, lq = example(generator)
    nothing = (torch.randn(4, 15, 3, 3), torch.zeros(4), torch.zeros(3, 4, 3, 3), torch.zeros(3))
    assert torch.equal(correct(nothing, gt[None], model[None])[0], model)
    assert share_left(nothing, [(gt, model, lq)]) == 1
