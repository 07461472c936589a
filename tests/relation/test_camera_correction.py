"""Corrections of cameras whose fault is known."""

import cv2
import numpy as np
import pytest
import torch

from drtl_plugin.relation.camera_correction import correct, share_left, train_correction
from drtl_plugin.relation.camera_fit import CameraFit, fit_camera
from tests.relation.test_camera_fit import pair, photographs, reduced, tensor


def despeckled(img: np.ndarray) -> np.ndarray:
    """A camera that removes speckles by a median, which is no kernel."""
    small = (reduced(img, 1.2) * 255).round().astype(np.uint8)
    return cv2.medianBlur(np.ascontiguousarray(small), 3) / 255


@pytest.fixture(scope='module')
def sharp() -> torch.Tensor:
    return torch.stack([tensor(img) for img in photographs()])


@pytest.fixture(scope='module')
def fitted(sharp) -> CameraFit:
    return fit_camera([pair(despeckled(img), img) for img in photographs()[:3]], sharp)


def test_what_no_kernel_can_do_is_learned_from_other_scenes(fitted, generator):
    gt = tensor(photographs()[3])[None].float()
    gt = (gt * 255).round() / 255
    lq = tensor(despeckled(photographs()[3]))[None].float()
    made, without = (
        CameraFit(**{**vars(fitted), 'noise': torch.zeros(3, 3), 'correction': correction})(gt, generator)
        for correction in (fitted.correction, ())
    )
    inner = (..., slice(8, -8), slice(8, -8))
    errors = [(img - lq)[inner].square().mean().item() for img in (made, without)]
    assert errors[0] < 0.75 * errors[1]


def test_it_is_counted_in_what_the_fit_explains(fitted, sharp):
    assert fitted.explained > 0.5
    assert 0.3 < fitted.explained_left_out <= fitted.explained


def test_it_is_saved_with_the_fit(fitted, tmp_path):
    fitted.save(tmp_path / 'fit.pth')
    loaded = CameraFit.load(tmp_path / 'fit.pth')
    assert all(torch.equal(a, b) for a, b in zip(loaded.correction, fitted.correction))
    assert len(loaded.correction) == 6


def test_a_camera_that_a_kernel_describes_is_not_corrected(sharp):
    assert fit_camera([pair(reduced(img, 1.6), img) for img in photographs()], sharp).correction == ()


def test_share_left_is_one_without_and_falls_with_training(generator):
    gt = torch.rand(3, 64, 64, generator=generator)
    model = torch.nn.functional.avg_pool2d(gt, 2)
    lq = model + 0.2 * gt[:, ::2, ::2]  # what averaging leaves out
    nothing = [torch.randn(4, 15, 3, 3), torch.zeros(4), torch.zeros(3, 4, 3, 3), torch.zeros(3)]
    assert torch.equal(correct(tuple(nothing), gt[None], model[None])[0], model)
    assert share_left(tuple(nothing), [(gt, model, lq)]) == 1
    trained = train_correction([(gt, model, lq)], torch.Generator().manual_seed(0))
    assert share_left(trained, [(gt, model, lq)]) < 0.05
    again = train_correction([(gt, model, lq)], torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(trained, again))
