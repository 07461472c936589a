import cv2
import numpy as np
import pytest
from basicsr.metrics import calculate_psnr

from drtl_plugin.sources import sample as sample_data
from drtl_plugin.sources.sample import prepare_sample_data, simulate_camera


def pictures(names) -> set[str]:
    return {name if isinstance(name, str) else name[0] for name in names}


def test_no_picture_serves_two_purposes():
    sets = [pictures(names) for names in (sample_data._AUXILIARY, sample_data._SUPPORT, sample_data._HELD_OUT)]
    assert len(set.union(*sets)) == sum(map(len, sets))


def test_five_pairs_to_adapt_and_others_to_report(sample_root):
    for split, num in (('support', 5), ('val', 3)):
        gt_paths = sorted((sample_root / 'camera' / split / 'gt').iterdir())
        assert len(gt_paths) == num
        for path in gt_paths:
            gt = cv2.imread(str(path))
            lq = cv2.imread(str(path).replace('/gt/', '/lq/'))
            assert gt.shape == (lq.shape[0] * 4, lq.shape[1] * 4, 3)


def test_is_the_same_every_time_and_kept(sample_root, tmp_path):
    again = prepare_sample_data(tmp_path / 'again')
    files = sorted(path.relative_to(sample_root) for path in sample_root.rglob('*.png'))
    assert len(files) == 12 + 2 * 5 + 2 * 3
    assert all((again / name).read_bytes() == (sample_root / name).read_bytes() for name in files)
    (again / 'mark').touch()
    prepare_sample_data(again)
    assert (again / 'mark').exists()


def test_unfinished_data_has_no_name(tmp_path, monkeypatch):
    def fail(root):
        (root / 'auxiliary').mkdir(parents=True)
        raise OSError('disk full')

    monkeypatch.setattr(sample_data, '_write', fail)
    with pytest.raises(OSError, match='disk full'):
        prepare_sample_data(tmp_path / 'sample')
    assert list(tmp_path.iterdir()) == []


def test_camera_keeps_place_and_colour():
    rng = np.random.default_rng(0)
    scene = cv2.GaussianBlur(rng.integers(0, 256, (160, 160, 3)).astype(np.uint8), (0, 0), 12)
    scene = cv2.normalize(scene, None, 40, 215, cv2.NORM_MINMAX)
    picture = simulate_camera(scene, rng, noise=0, quality=100)
    reduced = cv2.resize(scene, (40, 40), interpolation=cv2.INTER_AREA)
    psnr = calculate_psnr(picture, reduced, 2)
    assert psnr > 38
    # a shift by a pixel, or red for blue, would be far from that
    assert calculate_psnr(np.roll(picture, 1, 0), reduced, 2) < psnr - 3
    assert calculate_psnr(picture[..., ::-1], reduced, 2) < psnr - 3


def test_camera_noise_is_what_differs_between_exposures():
    scene = np.full((256, 256, 3), 128, np.uint8)
    first, second = (simulate_camera(scene, np.random.default_rng(seed), quality=100) for seed in (0, 1))
    assert 0.5 < (first.astype(float) - second).std() < 10
