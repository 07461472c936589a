"""The camera fit of a run."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch

from drtl_plugin import cli
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.models import camera
from drtl_plugin.runtime import checkpoints
from drtl_plugin.tasks.camera_fit import CameraFit
from tests.models.helpers import batch_of, feed, skip_start


@pytest.fixture
def fit_opt(quick_opt) -> dict:
    quick_opt['drtl']['camera_fit'] = True
    return quick_opt


@pytest.fixture
def plain_fit() -> CameraFit:
    """A camera that averages 8 x 8 pixels, without noise."""
    kernel, tone = torch.full((3, 8, 8), 1 / 64), torch.tensor([[0.0, 1, 0, 0]] * 3)
    noise = {'noise': torch.zeros(3, 3), 'colour_correlation': torch.eye(3), 'neighbour_correlation': 0.0}
    return CameraFit(4, kernel, tone, torch.zeros(5, 2), **noise, gt_sigma=0.0, explained=0.5, explained_left_out=0.5)


@pytest.fixture
def fitted(monkeypatch, plain_fit) -> list:
    """The pairs that cameras are fitted to; each fit is the plain one."""
    calls: list = []
    monkeypatch.setattr(camera, 'fit_camera', lambda pairs, patches: calls.append(pairs) or plain_fit)
    return calls


@pytest.mark.slow
def test_it_is_a_task_like_any_other(build, fit_opt):
    model = build(fit_opt)
    feed(model, [0, 4])
    assert model.library.labels[-1] == model.graph.labels[-1] == 'camera fit'
    assert len(model.weights) == 5
    # The LQ patches of that episode are the camera's, but for the noise.
    made = model.camera_fit(model.batch.gt[1], torch.Generator().manual_seed(7))
    noise = (model.camera_fit.noise.sum() ** 0.5).item()
    assert (model.batch.lq[1] - made).abs().mean() < 2 * noise
    assert (model.batch.lq[0] - made).abs().mean() > 2 * (model.batch.lq[1] - made).abs().mean()


@pytest.mark.parametrize('has_target', [True, False])
def test_it_is_drawn_like_any_other(build, fit_opt, fitted, has_target):
    if not has_target:
        del fit_opt['datasets']['train']['target']
    model = build(fit_opt)
    skip_start(model)
    batch, drawn = batch_of(model, 2), set()
    for model.num_update in range(20):
        model.feed_data(batch)
        drawn.update(model.batch.tasks)
    assert drawn == set(range(4 + has_target))
    assert (model.camera_fit is None) == (not has_target) == (not fitted)


def test_auxiliary_photographs_are_made_as_soft_as_the_cameras(build, fit_opt, monkeypatch, plain_fit):
    fit = dataclasses.replace(plain_fit, gt_sigma=1.0)
    monkeypatch.setattr(camera, 'fit_camera', lambda *_: fit)
    model = build(fit_opt)
    skip_start(model)
    batch = batch_of(model, 2)
    model.feed_data(batch)
    expected = fit.ground_truth(batch['query_gt'].flatten(0, 1)).view_as(batch['query_gt'])
    assert torch.equal(model.batch.gt[:, 1:], expected)
    assert not torch.equal(expected, batch['query_gt'])


def test_a_camera_is_fitted_once_a_run(workdir, fit_opt, write_opt, fitted):
    fit_opt['logger']['save_checkpoint_freq'] = 1
    assert cli.main(['train', '-opt', write_opt(fit_opt)]) == 0
    assert len(fitted) == 1
    fit_opt['train']['total_iter'] = 3
    assert cli.main(['train', '-opt', write_opt(fit_opt), '--auto_resume']) == 0
    assert len(fitted) == 2


def test_building_a_model_reads_no_data(build, fit_opt, fitted):
    for key in ('gt', 'lq'):
        fit_opt['datasets']['train']['target'][f'dataroot_{key}'] = 'nowhere'
    fit_opt['datasets']['train']['dataroot_gt'] = 'nowhere'
    model = build(fit_opt)
    assert not fitted
    with pytest.raises(DataError, match='nowhere'):
        model.start()


def test_the_data_set_of_the_loop_is_used(build, fit_opt, fitted):
    model = build(fit_opt)
    train_set = build(fit_opt).train_set
    model.train_set = train_set
    model.prepare()
    assert model.train_set is train_set
    assert fitted == [train_set.target_pairs]


def test_a_fit_given_by_path_is_taken(build, fit_opt, tmp_path, fitted, plain_fit):
    path = tmp_path / 'fit.pth'
    checkpoints.save(plain_fit.state(), path)
    fit_opt['path']['pretrain_camera_fit'] = str(path)
    model = build(fit_opt)
    model.prepare()
    assert torch.equal(model.camera_fit.kernel, plain_fit.kernel)
    assert not fitted
    checkpoints.save(dataclasses.replace(plain_fit, scale=2).state(), path)
    with pytest.raises(OptionError, match='is for scale 2, not 4'):
        build(fit_opt)


def test_it_has_its_share_of_the_weights_from_the_start(build, fit_opt, fitted):
    fit_opt['drtl']['weighting'].update(fit_share=0.8, relation='uniform')
    model = build(fit_opt)
    model.prepare()
    assert torch.allclose(model.weights, torch.tensor([0.2, 0.2, 0.2, 0.2, 4.2]))
    model.start()
    assert torch.allclose(model.weights, torch.tensor([0.2, 0.2, 0.2, 0.2, 4.2]))


def test_pairs_that_are_too_small_to_fit_are_named(build, fit_opt, tmp_path):
    for folder, side in (('gt', 64), ('lq', 16)):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / 'a.png'), np.zeros((side, side, 3), np.uint8))
        fit_opt['datasets']['train']['target'][f'dataroot_{folder}'] = str(tmp_path / folder)
    fit_opt['datasets']['train']['target']['num_shot'] = 1
    with pytest.raises(DataError, match=r'drtl\.camera_fit: .* camera_fit: false'):
        build(fit_opt).prepare()


def test_its_label_is_its_own(build, fit_opt, fitted):
    fit_opt['datasets']['train']['distortions'][0]['label'] = 'camera fit'
    with pytest.raises(OptionError, match="labelled 'camera fit'"):
        build(fit_opt).prepare()
