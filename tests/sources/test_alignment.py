"""How pairs are found, and how well their alignment is known: against warps that were made here."""

import cv2
import numpy as np
import pytest
from basicsr.utils.matlab_functions import imresize
from skimage import data

from drtl_plugin.errors import DataError
from drtl_plugin.sources import alignment as alignment_module
from drtl_plugin.sources.alignment import estimate_alignment, find_pairs, register

SCENE = cv2.resize(data.astronaut()[..., ::-1], (1024, 1024), interpolation=cv2.INTER_CUBIC)
SIDE = 800


def pair(shift=(0.0, 0.0), zoom=1.0, turn=0.0, noise=0.0, scale=4):
    """``(lq, gt)``; the middle of lq shows what lies ``shift`` low-quality pixels from the middle of gt."""
    inner = (len(SCENE) - SIDE) // 2
    middle = (SIDE - 1) / 2
    linear = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    offset = middle + inner + scale * np.array(shift) - linear @ [middle, middle]
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    seen = cv2.warpAffine(SCENE, np.column_stack([linear, offset]), (SIDE, SIDE), flags=flags)
    lq = imresize(seen.astype(np.float32) / 255, 1 / scale) * 255
    lq = lq + np.random.default_rng(0).normal(0, noise, lq.shape)
    return np.clip(np.round(lq), 0, 255).astype(np.uint8), SCENE[inner:-inner, inner:-inner]


WARPS = [
    {'shift': (0.5, -0.25)},
    {'shift': (3.2, -2.1)},
    {'shift': (15, -9)},
    {'shift': (1.3, 0.7), 'zoom': 1.01},
    {'zoom': 0.99, 'scale': 2},
    {'turn': 0.01},
    {'shift': (2, 1), 'zoom': 1.005, 'noise': 20},
]


@pytest.mark.parametrize('warp', WARPS)
def test_warps_are_recovered_and_undone(warp):
    lq, gt = pair(**warp)
    scale = warp.get('scale', 4)
    alignment = estimate_alignment(lq, gt, scale)
    assert np.abs(np.subtract(alignment.shift, warp.get('shift', (0, 0)))).max() < 0.03
    assert abs(alignment.scale - warp.get('zoom', 1)) < 5e-4
    assert not alignment.is_hopeless
    turn = np.arctan2(alignment.matrix[1, 0], alignment.matrix[0, 0])
    assert abs(turn - warp.get('turn', 0)) < 5e-4
    poor, good = register(lq, gt, scale, alignment)
    assert good.shape == (poor.shape[0] * scale, poor.shape[1] * scale, 3)
    assert poor.size > 0.8 * lq.size
    assert estimate_alignment(poor, good, scale).displacement < 0.1
    reduced = cv2.resize(good, poor.shape[1::-1], interpolation=cv2.INTER_AREA).astype(float)
    # As near as a pair that was never warped; without registration it is several times as far.
    untouched = cv2.resize(pair(scale=scale)[1], lq.shape[1::-1], interpolation=cv2.INTER_AREA).astype(float)
    bound = np.abs(untouched - pair(noise=warp.get('noise', 0), scale=scale)[0]).mean()
    assert np.abs(reduced - poor).mean() < 1.5 * bound + 0.5


@pytest.mark.parametrize('noise', [0, 10])
def test_what_lies_well_is_left_alone(noise):
    lq, gt = pair(noise=noise)
    alignment = estimate_alignment(lq, gt, 4)
    assert np.array_equal(alignment.matrix, np.eye(2, 3))
    assert alignment.displacement == 0
    poor, good = register(lq, gt, 4, alignment)
    assert np.array_equal(poor, lq)
    assert np.array_equal(good, gt)


@pytest.mark.parametrize('cut', [1, 2, 3])
def test_sizes_that_are_no_multiples(cut):
    lq, gt = pair(shift=(2, 1))
    alignment = estimate_alignment(lq, gt[:-cut, :-cut], 4)
    assert np.abs(np.subtract(alignment.shift, (2, 1))).max() < 0.03
    assert abs(alignment.scale - 1) < 5e-4


def test_large_photographs(monkeypatch):
    """They are compared at a smaller size, from which the map has to be brought back."""
    lq, gt = pair(shift=(2, 3), zoom=1.02, turn=0.02, scale=2)
    whole = estimate_alignment(lq, gt, 2)
    monkeypatch.setattr(alignment_module, '_SIDE', 150)
    small = estimate_alignment(lq, gt, 2)
    for alignment in (whole, small):
        assert np.abs(np.subtract(alignment.shift, (2, 3))).max() < 0.04
        assert abs(alignment.scale - 1.02) < 1e-3


def test_other_scenes_and_blank_images_are_hopeless():
    lq, _ = pair()
    assert estimate_alignment(lq, cv2.resize(data.coffee(), (SIDE, SIDE)), 4).is_hopeless
    assert estimate_alignment(np.zeros_like(lq), np.zeros((SIDE, SIDE, 3), np.uint8), 4).is_hopeless


def test_images_of_other_sizes_are_cropped_to_what_they_share():
    lq, gt = pair(shift=(2, 0))
    poor, good = register(lq, gt[:600, :700], 4, estimate_alignment(lq, gt[:600, :700], 4))
    assert good.shape[:2] == (4 * poor.shape[0], 4 * poor.shape[1])
    assert 590 <= good.shape[0] <= 600
    with pytest.raises(DataError, match='less than a quarter'):
        register(lq, gt[:300, :300], 4, estimate_alignment(lq, gt, 4))


class TestFindPairs:
    @pytest.mark.parametrize(
        'gt, lq',
        [
            ('gt/a.png', 'lq/a.png'),
            ('HR/a.jpg', 'LR/a.png'),
            ('H/a.png', 'L/a.png'),
            ('hr/a_HR.png', 'lr/a_LR4.png'),
            ('a_HR.png', 'a_LR.png'),
            ('a_gt.png', 'a_lq.png'),
            ('aH.PNG', 'aL.PNG'),
            ('a_h.png', 'a_l.png'),
            ('gt/a_h.png', 'lq/a_l.png'),
        ],
    )
    def test_layouts(self, tmp_path, gt, lq):
        for name in (gt, lq, 'notes.txt'):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert find_pairs(tmp_path) == {'a': (tmp_path / gt, tmp_path / lq)}

    @pytest.mark.parametrize('lq', ['lr_x4', 'LR_X4', 'lrx4'])
    def test_folders_of_scales(self, tmp_path, lq):
        for name in ('HR', lq, 'lr_x2', 'LR', 'lr_x40'):
            (tmp_path / name).mkdir()
            (tmp_path / name / 'a.png').touch()
        gt = tmp_path / 'HR/a.png'
        assert find_pairs(tmp_path, 4) == {'a': (gt, tmp_path / lq / 'a.png')}
        assert find_pairs(tmp_path, 2) == {'a': (gt, tmp_path / 'lr_x2/a.png')}
        assert find_pairs(tmp_path, 3) == {'a': (gt, tmp_path / 'LR/a.png')}

    @pytest.mark.parametrize('name', ['beach', 'hall', 'x_h', 'a_LR', 'v1.0', 'Screenshot 2024-01-01 at 10.15.31 AM'])
    def test_names_that_both_have_are_whole(self, tmp_path, name):
        for side in ('gt', 'lq'):
            (tmp_path / side).mkdir()
            (tmp_path / side / f'{name}.png').touch()
        assert list(find_pairs(tmp_path)) == [name]

    @pytest.mark.parametrize(
        'names, message',
        [
            ([], r'contains no pairs\. Use two subfolders'),
            (['hr/a.png', 'lr_x2/a.png'], r'gt and lq, HR and LR, or HR and LR_x4\), or one folder'),
            (['a.png', 'b.png'], 'contains no pairs'),
            (['HR.png', 'LR.png'], 'contains no pairs'),
            (['a_HR.png'], 'a_HR.png has no partner'),
            (['gt/a.png', 'lq/b.png'], 'a.png has no partner'),
            (['gt/a.png', 'gt/a.jpg', 'lq/a.png'], 'have the same name'),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, names, message):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        with pytest.raises(DataError, match=message):
            find_pairs(tmp_path)

    @pytest.mark.parametrize(
        'names',
        [['gt/a.heic', 'lq/a.heic'], ['gt/a.png', 'lq/a.heic', 'gt/b.png', 'lq/b.png'], ['a_HR.heic', 'a_LR.png']],
    )
    def test_formats_that_are_not_read_are_named(self, tmp_path, names):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        with pytest.raises(
            DataError, match=r'--pairs: .*: cannot read a\w*\.heic.*; convert first, e\.g\. heif-convert'
        ):
            find_pairs(tmp_path)

    @pytest.mark.parametrize('raw', ['a_HR.nef', 'a_HR.ARW'])
    def test_a_raw_file_beside_its_jpeg_is_ignored(self, tmp_path, raw):
        for name in (raw, 'a_HR.jpg', 'a_LR.jpg'):
            (tmp_path / name).touch()
        assert find_pairs(tmp_path) == {'a': (tmp_path / 'a_HR.jpg', tmp_path / 'a_LR.jpg')}

    def test_missing_folder(self, tmp_path):
        with pytest.raises(DataError, match='--pairs: there is no folder'):
            find_pairs(tmp_path / 'none')
