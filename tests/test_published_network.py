"""A published network that neither BasicSR nor spandrel knows, as a user's own."""

import shutil
import sys
from pathlib import Path

import cv2
import pytest
import yaml
from basicsr.metrics import calculate_psnr
from basicsr.utils.matlab_functions import imresize
from basicsr.utils.registry import ARCH_REGISTRY

from drtl_plugin import cli

ARCH = Path(__file__).resolve().parents[1] / 'benchmarks/bsrn_arch.py'


@pytest.mark.parametrize(('scale', 'published'), [(2, 38.10), (3, 34.46), (4, 32.35)])
def test_bsrn_restores_set5_as_published(real_data, workdir, monkeypatch, scale, published):
    """PSNR-Y as in the paper (arXiv 2205.05996), to within 0.05 dB."""
    weights = real_data / f'weights/bsrn_x{scale}.pth'
    if not weights.is_file():
        pytest.skip('needs the published weights of BSRN')
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', dict(ARCH_REGISTRY._obj_map))
    shutil.copy(ARCH, workdir / 'bsrn_arch.py')
    network = {'type': 'BSRN', 'num_feat': 64, 'num_block': 8, 'upscale': scale}
    (workdir / 'bsrn.yml').write_text(yaml.safe_dump({'network_g': network, 'scale': scale}))
    (workdir / 'lq').mkdir()
    ground_truths = {}
    for path in sorted((real_data / 'set5/hr').iterdir()):
        gt = cv2.imread(str(path))
        gt = gt[: gt.shape[0] // scale * scale, : gt.shape[1] // scale * scale]
        lq = imresize(gt / 255, 1 / scale) * 255
        cv2.imwrite(str(workdir / f'lq/{path.stem}.png'), lq.round().clip(0, 255))
        ground_truths[path.stem] = gt
    arguments = ['upscale', '-i', 'lq', '-o', 'sr', '--weights', str(weights), '-opt', 'bsrn.yml']
    try:
        assert cli.main([*arguments, '--import', 'bsrn_arch']) == 0
    finally:
        sys.modules.pop('bsrn_arch', None)
    scores = [
        calculate_psnr(cv2.imread(str(workdir / f'sr/{name}.png')), gt, crop_border=scale, test_y_channel=True)
        for name, gt in ground_truths.items()
    ]
    assert sum(scores) / len(scores) == pytest.approx(published, abs=0.05)
