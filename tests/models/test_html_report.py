"""The report, and what a browser makes of it."""

import base64
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from drtl_plugin import cli
from drtl_plugin.models.html_report import Comparison, Curves, curves_of_folder, write_html

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
# Moves the slider as a hand does, and writes what came of it where --dump-dom shows it.
_PROBE = """<script>
const probe = [];
for (const value of [null, 0, 30, 100]) {
  const slider = document.querySelector('.compare input');
  if (value !== null) {
    slider.value = value;
    slider.dispatchEvent(new Event('input', {bubbles: true}));
  }
  probe.push(getComputedStyle(document.querySelector('.compare .before')).clipPath);
}
const loaded = Array.from(document.images).every((image) => image.complete && image.naturalWidth > 0);
document.body.dataset.probe = JSON.stringify({probe, loaded, faults: window.faults});
</script>"""
_WATCH = '<script>window.faults = []; window.onerror = (message) => { window.faults.push(message); };</script>'


def comparison(name: str) -> Comparison:
    rng = np.random.default_rng(0)
    return Comparison(name, *(rng.integers(0, 256, (90, 80, 3), np.uint8) for _ in range(3)))


def test_everything_is_in_one_file(tmp_path):
    image = comparison('<b> & "quotes"')
    write_html(tmp_path / 'a.html', '<run>', 'x < y', [image], [Curves('c', 'x', 'y', {'l': [(0, 1)]})], 'a: "<b>"')
    page = (tmp_path / 'a.html').read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert '<b>' not in page
    assert '&lt;b&gt; &amp; &quot;quotes&quot;' in page
    pictures = [
        cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_COLOR)
        for content in re.findall(r'data:image/png;base64,([^"]+)', page)
    ]
    for wanted, picture in zip((image.after, image.before, image.gt), pictures):
        assert np.array_equal(picture, wanted)
    assert len(pictures) == 4


def test_a_training_run_leaves_one(workdir, quick_opt, write_opt):
    quick_opt['val']['val_freq'] = 1
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
    root = workdir / 'experiments' / quick_opt['name']
    page = (root / 'report.html').read_text()
    for words in ('after adaptation', 'sample_camera 3', 'psnr_y while training', 'Weights of the tasks', 'model_type'):
        assert words in page
    metrics, *_ = curves_of_folder(root)
    assert set(metrics.lines) == {'sample_camera_bicubic', 'sample_camera', 'sample_camera_adapted'}
    assert [step for step, _ in metrics.lines['sample_camera']] == [1, 2]
    assert metrics.lines['sample_camera_bicubic'][0][1] == metrics.lines['sample_camera_bicubic'][1][1]


@pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium here')
def test_the_slider_moves(tmp_path):
    write_html(tmp_path / 'a.html', 'run', 'text', [comparison('a'), comparison('b')], [], 'a: 1')
    page = (tmp_path / 'a.html').read_text()
    page = page.replace('<head>', f'<head>{_WATCH}').replace('</body>', f'{_PROBE}</body>')
    (tmp_path / 'probe.html').write_text(page)
    command = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', '--dump-dom']
    command += [f'--user-data-dir={tmp_path}/profile', f'file://{tmp_path}/probe.html']
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    probe = re.search(r'data-probe="([^"]+)"', result.stdout)[1].replace('&quot;', '"')
    clips = [f'inset(0px {share} 0px 0px)' for share in ('50%', '100%', '70%', '0%')]
    assert re.findall(r'inset\([^)]*\)', probe) == clips
    assert '"loaded":true,"faults":[]' in probe
    assert 'CONSOLE' not in result.stderr
