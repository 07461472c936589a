"""The report, and what a browser makes of it."""

import base64
import csv
import html.parser
import json
import re
import shutil
import subprocess
import warnings

import cv2
import numpy as np
import pytest
import torch

from drtl_plugin import cli
from drtl_plugin.models import camera
from drtl_plugin.relation.graph import graph_from_embeddings
from drtl_plugin.report.figures import draw_graph
from drtl_plugin.report.html import (
    Comparison,
    Curves,
    Page,
    Table,
    curves_of_folder,
    illustrate,
    illustrations_of_folder,
    write_html,
)
from drtl_plugin.report.tables import Gain, duration_in_words, gains_of_results, write_graph
from drtl_plugin.tasks.camera_fit import CameraFit

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
# Moves the slider as a user would, and writes the result where --dump-dom shows it.
_PROBE = """<script>
const probe = [], dividers = [];
const compare = document.querySelector('.compare'), slider = compare.querySelector('input');
for (const value of [null, 0, 30, 100]) {
  if (value !== null) {
    slider.value = value;
    slider.dispatchEvent(new Event('input', {bubbles: true}));
  }
  probe.push(getComputedStyle(document.querySelector('.compare .before')).clipPath);
  const [image, line] = [compare, compare.querySelector('.divider')].map((part) => part.getBoundingClientRect());
  dividers.push(Math.round(100 * ((line.left + line.right) / 2 - image.left) / image.width));
}
const loaded = Array.from(document.images).every((image) => image.complete && image.naturalWidth > 0);
const fits = document.documentElement.scrollWidth <= document.documentElement.clientWidth;
const folded = Array.from(document.querySelectorAll('details')).every((details) => !details.open);
slider.focus();
const focus = [document.activeElement === slider, getComputedStyle(compare).outlineStyle];
document.body.dataset.probe = JSON.stringify({probe, dividers, fits, folded, focus, loaded, faults: window.faults});
</script>"""
_WATCH = '<script>window.faults = []; window.onerror = (message) => { window.faults.push(message); };</script>'


class Reader(html.parser.HTMLParser):
    """Texts by element, attributes of images, and everything that is not in ``<details>``."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.images: list[dict] = []
        self.unfolded = ''
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == 'img':
            self.images.append(dict(attributes))
        elif tag not in ('meta', 'link', 'input', '!doctype'):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append('')

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][-1] += data
        if 'details' not in self._open:
            self.unfolded += data


def comparison(name: str) -> Comparison:
    rng = np.random.default_rng(0)
    return Comparison(name, *(rng.integers(0, 256, (90, 80, 3), np.uint8) for _ in range(3)))


def page(title: str, **contents) -> Page:
    empty = {'gains': [], 'unmeasured': '', 'facts': {}, 'tables': [], 'comparisons': [], 'illustrations': []}
    return Page(title, **{**empty, 'details': {}, **contents})


def pictures_of(text: str) -> list[bytes]:
    return [base64.b64decode(content) for content in re.findall(r'data:image/png;base64,([^"]+)', text)]


def test_everything_is_in_one_file(tmp_path):
    image = comparison('<b> & "quotes"')
    curves = illustrate(Curves('c', 'x', 'y', {'l': [(0, 1)]}, 'caption'))
    contents = {'comparisons': [image], 'illustrations': [curves], 'details': {'options': 'a: "<b>"'}}
    write_html(tmp_path / 'a.html', page('<run>', facts={'x': 'x < y'}, **contents))
    text = (tmp_path / 'a.html').read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert '<b>' not in text
    assert '&lt;b&gt; &amp; &#34;quotes&#34;' in text
    assert 'x &lt; y' in text
    pictures = [cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR) for png in pictures_of(text)]
    for wanted, picture in zip((image.after, image.before, image.gt), pictures[:3], strict=True):
        assert np.array_equal(picture, wanted)
    assert len(pictures) == 4
    assert all(image['alt'] for image in Reader(text).images)


@pytest.mark.parametrize('name', ['x_BODY', 'TITLE', 'SHOWN', '{{ x }}', '{% if %}', '<b>&', '\'"><script>', '_$x$'])
def test_names_are_shown_as_they_are(tmp_path, name):
    """In every place where a run, an image, a data set or a task may be named."""
    write_html(
        tmp_path / 'a.html',
        page(
            name,
            gains=[Gain('+1 dB', name)],
            facts={name: name},
            tables=[Table(name, [name], [[name, name]])],
            comparisons=[comparison(name)],
            details={name: name},
        ),
    )
    read = Reader((tmp_path / 'a.html').read_text())
    for tag, number in {'title': 1, 'h1': 1, 'dt': 1, 'dd': 1, 'td': 1, 'h3': 1, 'summary': 1, 'pre': 1}.items():
        assert read.texts[tag] == [name] * number
    assert [image['alt'] for image in read.images] == [
        f'{name}, {what}' for what in ('after adaptation', 'before adaptation', 'ground truth')
    ]
    assert (len(read.texts['body']), len(read.texts['script'])) == (1, 1)


def test_a_training_run_leaves_one(workdir, quick_opt, write_opt, monkeypatch):
    quick_opt['name'] = 'x_BODY'
    quick_opt['val']['val_freq'] = 1
    quick_opt['drtl']['camera_fit'] = True
    kernel, tone = torch.full((3, 8, 8), 1 / 64), torch.tensor([[0.0, 1, 0, 0]] * 3)
    noise = {'noise': torch.zeros(3, 3), 'colour_correlation': torch.eye(3), 'neighbour_correlation': 0.0}
    fit = CameraFit(4, kernel, tone, torch.zeros(5, 2), **noise, gt_sigma=0.0, explained=0.5, explained_left_out=0.5)
    monkeypatch.setattr(camera, 'fit_camera', lambda pairs, patches: fit)
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
    root = workdir / 'experiments' / quick_opt['name']
    text = (root / 'report.html').read_text()
    read = Reader(text)
    assert read.texts['h1'] == ['x_BODY']
    for words in ('after adaptation', 'psnr_y while training', 'Weights of the tasks', 'model_type'):
        assert words in text
    metrics, *_ = curves_of_folder(root, {})
    assert set(metrics.lines) == {'sample_camera_bicubic', 'sample_camera', 'sample_camera_adapted'}
    assert [step for step, _ in metrics.lines['sample_camera']] == [1, 2]
    assert metrics.lines['sample_camera_bicubic'][0][1] == metrics.lines['sample_camera_bicubic'][1][1]

    # It begins with the gains.
    with open(root / 'metrics.csv') as file:
        psnr = {row['dataset']: float(row['value']) for row in csv.DictReader(file) if row['metric'] == 'psnr_y'}
    adapted = psnr['sample_camera_adapted']
    gains = [adapted - psnr['sample_camera'], adapted - psnr['sample_camera_bicubic']]
    assert read.texts['strong'] == [f'{gain:+.2f} dB PSNR-Y' for gain in gains]
    # The network, and how long it took.
    weights = torch.load(root / 'models/net_g_latest.pth', weights_only=True)['params']
    facts = dict(zip(read.texts['dt'], read.texts['dd'], strict=True))
    assert facts['Network'] == f'EDSR, {sum(weight.numel() for weight in weights.values()):,} parameters'
    assert facts['Training'] == '2 iterations'
    assert re.fullmatch(r'(\d+ min )?\d+ s', facts['Duration'])
    # Images by their files.
    files = (workdir / 'datasets/drtl_sample/camera/val/gt').iterdir()
    assert sorted(read.texts['h3']) == [f'{name} (sample_camera)' for name in sorted(path.stem for path in files)]
    # The graph and the camera fit are explained.
    pictures = pictures_of(text)
    for name in ('knowledge_graph.png', 'camera_fit.png'):
        assert (root / name).read_bytes() in pictures
    graph_caption, fit_caption = read.texts['figcaption'][-2:]
    for words in ('closer', 'area', 'colour', 'Orange lines', '90% of the total weight is reserved for it'):
        assert words in graph_caption
    assert 'blur kernel' in fit_caption
    # The options are folded.
    assert 'model_type' not in read.unfolded


def test_weights_are_the_last_ones_in_their_order(tmp_path, generator):
    graph = graph_from_embeddings(list('abcd'), torch.randn(4, 8, generator=generator), torch.ones(8))
    weights = torch.tensor([0.5, 0.0, 3.0, 0.5])  # without a floor, some may be 0
    write_graph(graph, tmp_path / 'knowledge_graph.json', weights)
    draw_graph(graph, tmp_path / 'knowledge_graph.png', weights, 0.7)
    bars, picture = illustrations_of_folder(tmp_path, {}, 0.7)
    assert bars.alt == 'Weights of the tasks: c ×3; d (fixed share 70%) ×0.5; a ×0.5; b ×0'
    assert '70% of the total weight' in picture.caption
    without_fit = illustrations_of_folder(tmp_path, {}, None)
    assert 'fixed share' not in without_fit[0].alt
    assert 'fit_share' not in without_fit[1].caption


def test_lines_may_have_any_name():
    """Cameras name photographs ``_MG_0001``: a line without a legend to matplotlib, which takes ``$`` for formulas."""

    def drawn(name: str) -> bytes:
        return illustrate(Curves('c', 'x', r'$\nothing$', {name: [(0, 1), (1, 2)]}, '')).png

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len({drawn(name) for name in ('_MG_0001', '_MG_0002', r'$\nothing$')}) == 3


def test_gains():
    results = {
        'a_bicubic': {'ssim': 0.5, 'psnr': 20.0},
        'a': {'ssim': 0.6, 'psnr': 21.0},
        'a_adapted': {'ssim': 0.75, 'psnr': 20.75},
        'b_bicubic': {'lpips': 0.5},
        'b': {'lpips': 0.25},
        'without_metrics_bicubic': {},
    }
    assert gains_of_results(results, {'psnr': 'PSNR'}) == [
        ('-0.25 dB PSNR', 'after adaptation, compared with before adaptation (a)'),
        ('+0.75 dB PSNR', 'after adaptation, compared with bicubic upsampling (a)'),
        ('-0.2500 lpips', 'before adaptation, compared with bicubic upsampling (b)'),
    ]


@pytest.mark.parametrize(('seconds', 'words'), [(0.2, '0 s'), (59.7, '1 min'), (75, '1 min 15 s'), (7203, '2 h 3 s')])
def test_durations(seconds, words):
    assert duration_in_words(seconds) == words


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium here')
def test_the_slider_moves(tmp_path):
    curves = illustrate(Curves('c', 'x', 'y', {'l': [(0, 1), (1, 2)]}, 'caption'))
    contents = {'illustrations': [curves], 'details': {'options': 'a: 1'}, 'gains': [Gain('+1 dB', 'a' * 60)]}
    table = Table('t', ['a long name of a column'] * 6, [['cell'] * 6])
    write_html(
        tmp_path / 'a.html', page('run', comparisons=[comparison('a'), comparison('b')], tables=[table], **contents)
    )
    text = (tmp_path / 'a.html').read_text()
    text = text.replace('<head>', f'<head>{_WATCH}').replace('</body>', f'{_PROBE}</body>')
    (tmp_path / 'probe.html').write_text(text)
    command = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', '--dump-dom']
    command += ['--window-size=400,800', f'--user-data-dir={tmp_path}/profile', f'file://{tmp_path}/probe.html']
    for _ in range(3):  # under load, a headless page does not always get the focus
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        probe = json.loads(html.unescape(re.search(r'data-probe="([^"]+)"', result.stdout)[1]))
        if probe['focus'][1] == 'solid':
            break
    assert probe['probe'] == [f'inset(0px {share} 0px 0px)' for share in ('50%', '100%', '70%', '0%')]
    assert probe['dividers'] == [50, 0, 30, 100]
    assert probe['loaded']
    assert probe['faults'] == []
    assert probe['fits']  # on a phone
    assert probe['folded']
    assert probe['focus'] == [True, 'solid']
    assert 'CONSOLE' not in result.stderr
