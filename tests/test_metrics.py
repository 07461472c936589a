"""Metrics of pyiqa: what a stand-in is handed, since it is an optional extra; and itself, where it is installed."""

import sys
import types
from urllib.error import URLError

import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_metric, calculate_psnr, calculate_ssim

from drtl_plugin import cli, metrics
from drtl_plugin.errors import DataError, OptionError


@pytest.fixture(autouse=True)
def forget():
    metrics._build.cache_clear()
    yield
    metrics._build.cache_clear()


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    gt = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return np.clip(gt + rng.normal(0, 10, gt.shape), 0, 255).astype(np.uint8), gt


@pytest.fixture
def stand_in(monkeypatch):
    """``pyiqa`` with a metric that needs a reference, one that needs none, and one whose weights are missing."""

    class Metric(torch.nn.Module):
        def __init__(self, mode, lower_better, answer):
            super().__init__()
            self.metric_mode, self.lower_better, self.answer = mode, lower_better, answer

        def forward(self, *images):
            assert all(image.dtype == torch.float32 and image.max() <= 1 for image in images)
            return self.answer(*images)

    def create_metric(name, **arguments):
        torch.rand(1)
        if 'colour' in arguments:
            raise TypeError("unexpected keyword argument 'colour'")
        if name == 'weights':
            raise URLError('no network')
        if name == 'red':
            return Metric('NR', False, lambda image: image[:, 0].mean())
        return Metric('FR', True, lambda image, gt: (image - gt).abs().mean())

    module = types.ModuleType('pyiqa')
    module.create_metric, module.list_models = create_metric, lambda: ['l1', 'red', 'weights']
    monkeypatch.setitem(sys.modules, 'pyiqa', module)


def test_images_are_rgb_between_0_and_1_without_border(stand_in, images):
    img, gt = images
    value = calculate_metric(
        {'img': img, 'img2': gt}, {'type': 'calculate_pyiqa', 'metric': 'l1', 'crop_border': 4, 'better': 'lower'}
    )
    inner = (slice(4, -4), slice(4, -4))
    assert value == pytest.approx(np.abs(img[inner].astype(float) - gt[inner]).mean() / 255, rel=1e-5)
    value = calculate_metric({'img': img}, {'type': 'calculate_pyiqa', 'metric': 'red'})
    assert value == pytest.approx(img[..., 2].mean() / 255, rel=1e-5)


def test_grey_images_and_arguments_that_are_lists(stand_in, images):
    img, gt = (image[..., 0] for image in images)
    value = calculate_metric(
        {'img': img, 'img2': gt}, {'type': 'calculate_pyiqa', 'metric': 'l1', 'crop_border': 2, 'window': [3, 3]}
    )
    inner = (slice(2, -2), slice(2, -2))
    assert value == pytest.approx(np.abs(img[inner].astype(float) - gt[inner]).mean() / 255, rel=1e-5)


def test_without_ground_truth_a_line_says_so(stand_in, images):
    with pytest.raises(OptionError, match='l1 needs GT'):
        calculate_metric({'img': images[0]}, {'type': 'calculate_pyiqa', 'metric': 'l1'})


def test_building_one_draws_no_random_numbers(stand_in):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    metrics.check_pyiqa({'type': 'calculate_pyiqa', 'metric': 'red'}, 'val.metrics.red')
    assert torch.equal(torch.rand(1), expected)


def test_a_training_run_has_it_in_its_table(stand_in, workdir, quick_opt, write_opt, capsys):
    quick_opt['val']['metrics'] = {'l1': {'type': 'calculate_pyiqa', 'metric': 'l1', 'better': 'lower'}}
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
    assert 'l1' in (workdir / 'experiments' / quick_opt['name'] / 'metrics.csv').read_text()


@pytest.mark.parametrize(
    ('section', 'error', 'message'),
    [
        ({'metric': 'wieghts'}, OptionError, r"x.metric: unknown metric of pyiqa 'wieghts'; did you mean 'weights'"),
        ({'metric': 'l1'}, OptionError, 'val.metrics.x.better: lower is better for l1; set better: lower'),
        ({'metric': 'red', 'better': 'lower'}, OptionError, 'higher is better for red'),
        (
            {'metric': 'red', 'colour': 1},
            OptionError,
            "x: pyiqa cannot build red: unexpected keyword argument 'colour'",
        ),
        ({'metric': 'weights'}, DataError, r'the weights of weights are not on this machine.*no network'),
    ],
)
def test_wrong_ones_are_named(stand_in, section, error, message):
    with pytest.raises(error, match=message):
        metrics.check_pyiqa({'type': 'calculate_pyiqa', **section}, 'val.metrics.x')


def test_without_pyiqa_a_line_says_how_to_get_it(monkeypatch, workdir, quick_opt, write_opt, capsys):
    monkeypatch.setitem(sys.modules, 'pyiqa', None)
    quick_opt['val']['metrics'] = {'lpips': {'type': 'calculate_pyiqa', 'metric': 'lpips', 'better': 'lower'}}
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
    assert "pip install 'drtl_plugin[pyiqa]'" in capsys.readouterr().err
    assert not (workdir / 'experiments').exists()


class TestRealOne:
    @pytest.fixture(autouse=True)
    def installed(self, monkeypatch, tmp_path):
        pytest.importorskip('pyiqa', reason='the optional extra pyiqa is not installed')
        monkeypatch.setenv('HF_HUB_OFFLINE', '1')

        def refuse(*args, **kwargs):
            raise URLError('no network in tests')

        monkeypatch.setattr('urllib.request.urlopen', refuse)
        monkeypatch.setattr('torch.hub.urlopen', refuse)

    def test_psnr_and_ssim_are_basicsr_s(self, images):
        img, gt = images
        section = {'type': 'calculate_pyiqa', 'crop_border': 4}
        data = {'img': img, 'img2': gt}
        assert calculate_metric(data, {**section, 'metric': 'psnr'}) == pytest.approx(
            calculate_psnr(img, gt, crop_border=4), abs=1e-3
        )
        assert calculate_metric(data, {**section, 'metric': 'ssim', 'test_y_channel': True}) == pytest.approx(
            calculate_ssim(img, gt, crop_border=4, test_y_channel=True), abs=1e-3
        )

    def test_missing_weights_are_named(self, monkeypatch, tmp_path):
        monkeypatch.setattr('pyiqa.utils.download_util.DEFAULT_CACHE_DIR', str(tmp_path))
        with pytest.raises(DataError, match='the weights of lpips are not on this machine'):
            metrics.check_pyiqa({'metric': 'lpips', 'better': 'lower'}, 'val.metrics.lpips')
