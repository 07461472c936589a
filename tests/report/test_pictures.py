"""What a run keeps of the images that it validates."""

import cv2
import numpy as np
import pytest

from drtl_plugin import cli
from drtl_plugin.models.drtl_model import DRTLModel
from drtl_plugin.report.pictures import compared_crop


@pytest.mark.parametrize(
    ('place', 'shape', 'start'),
    [
        ((500, 700), (1000, 1200), (436, 636)),  # the tile of 192 pixels, and 64 on each side
        ((0, 1008), (1000, 1200), (0, 880)),  # shifted inwards at the border
        ((60, 8), (300, 200), (0, 0)),
    ],
)
def test_crops_show_the_busiest_place_and_keep_no_image_in_memory(place, shape, start):
    rng = np.random.default_rng(0)
    gt = np.full((*shape, 3), 128, np.uint8)
    top, left = place
    busy = gt[top : top + 192, left : left + 192]
    busy[:] = rng.integers(0, 256, busy.shape, np.uint8)
    result = 255 - gt
    crop = compared_crop('name', result, gt)
    area = tuple(slice(begin, begin + 320) for begin in start)
    assert np.array_equal(crop.gt, gt[area]) and np.array_equal(crop.result, result[area])
    assert crop.name == 'name'
    assert crop.gt.base is None and crop.result.base is None


def test_a_run_keeps_crops_of_its_validated_images(workdir, quick_opt, write_opt, monkeypatch):
    models = []
    finish = DRTLModel.finish
    monkeypatch.setattr(DRTLModel, 'finish', lambda model, *modules: models.append(model) or finish(model, *modules))
    (workdir / 'large').mkdir()
    for side, factor in (('gt', 4), ('lq', 1)):
        folder = workdir / 'large' / side
        folder.mkdir()
        source = cv2.imread(f'datasets/drtl_sample/camera/val/{side}/coffee.png')
        image = np.tile(source, (3, 3, 1))[: 200 * factor, : 250 * factor]
        cv2.imwrite(str(folder / 'a.b.png'), image)
        quick_opt['datasets']['val'][f'dataroot_{side}'] = str(folder)
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
    compared = models[0].compared
    assert set(compared) == {'sample_camera_bicubic', 'sample_camera', 'sample_camera_adapted'}
    gt = cv2.imread(str(workdir / 'large/gt/a.b.png'))
    for (crop,) in compared.values():
        assert crop.name == 'a.b'
        assert crop.result.shape == crop.gt.shape == (320, 320, 3)
        left, top = cv2.minMaxLoc(cv2.matchTemplate(gt, crop.gt, cv2.TM_SQDIFF))[2]
        assert np.array_equal(crop.gt, gt[top : top + 320, left : left + 320])
        assert np.array_equal(crop.gt, compared['sample_camera'][0].gt)
