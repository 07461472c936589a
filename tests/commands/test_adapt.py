"""``basicsr adapt``: from a folder of pairs to weights of one's own camera."""

import math
import re
import shlex
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.metrics import calculate_psnr
from basicsr.utils import tensor2img
from basicsr.utils.registry import ARCH_REGISTRY
from PIL import Image
from torch import nn

from drtl_plugin import cli
from drtl_plugin.api import adapt as module
from drtl_plugin.api import adapt_model
from drtl_plugin.api.adapt_evaluation import evaluate_folds
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.models import adapter
from drtl_plugin.models.cross_validation import CrossValidation, folds_of
from drtl_plugin.runtime import progress
from drtl_plugin.runtime.trained_network import TrainedNetwork, load_trained
from tests.data.test_bad_files import damaged_png
from tests.data.test_photographs import display_p3
from tests.sources.test_alignment import pair

NETWORK = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 4, 'res_scale': 1}


@pytest.fixture
def quick(monkeypatch):
    """The option file of the command, with less to fit and to measure."""
    options = adapt_model.adaptation_options

    def quick_options(*arguments):
        opt = options(*arguments)
        opt['datasets']['train'].update(gt_size=64, distortions=[{'name': 'bicubic'}, {'name': 'gaussian_noise'}])
        opt['drtl'].update(camera_fit=False)
        opt['drtl']['weighting']['effective_tasks'] = 1.5
        opt['drtl']['hooks'] = [{'type': 'RelationHook', 'num_patches': 2, 'transfer_steps': 1}]
        return opt

    monkeypatch.setattr(adapt_model, 'adaptation_options', quick_options)
    monkeypatch.setattr(adapter, '_NUM_JUDGED', 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three pairs, and weights that know nothing."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    state = build_network(NETWORK).state_dict()
    torch.save({'params': state, 'network': NETWORK, 'scale': 4}, 'w.pth')
    (tmp_path / 'pairs').mkdir()
    lq, gt = pair()
    for name, (x, y) in {'a': (0, 0), 'b': (60, 40), 'c': (100, 120)}.items():
        cv2.imwrite(f'pairs/{name}_LR.png', lq[y : y + 64, x : x + 72])
        cv2.imwrite(f'pairs/{name}_HR.png', gt[4 * y : 4 * y + 256, 4 * x : 4 * x + 288])
    return tmp_path


def test_from_pairs_to_weights(folder, quick, capsys):
    command = ['adapt', '--pairs', 'pairs', '--weights', 'w.pth', '-o', 'mine', '--budget', '70']
    assert cli.main(command) == 0
    report = (folder / 'mine/report.md').read_text()
    assert report in capsys.readouterr().out
    assert {path.name for path in (folder / 'mine').iterdir()} == {
        *(
            'adapt.yml',
            'pairs',
            'report.md',
            'report.html',
            'net_g_adapted_latest.pth',
            'knowledge_graph.json',
            'knowledge_graph.png',
        )
    }
    # A pair, restored by the weights that were given.
    lq = torch.from_numpy(cv2.imread('pairs/b_LR.png')[..., ::-1].transpose(2, 0, 1) / np.float32(255))[None]
    with torch.no_grad():
        restored = tensor2img(load_trained('w.pth').net(lq))
    psnr = calculate_psnr(restored, cv2.imread('pairs/b_HR.png'), crop_border=4, test_y_channel=True)
    _, row = (line for line in report.splitlines() if line.startswith('| b |'))  # of alignment, and of evaluation
    before, after = (float(cell) for cell in row.split('|')[2:4])
    assert before == pytest.approx(psnr, abs=0.0051)
    assert after > before  # by a network that knew nothing
    assert 'Adapting gains' in report
    gain = re.search(r'Adapting gains (\S+) dB', report)[1]
    page = (folder / 'mine/report.html').read_text()
    assert re.search(r'<li><strong>(.*?)</strong>', page)[1] == f'+{gain} dB PSNR-Y'
    assert re.findall('<h3>(.*)</h3>', page) == ['a', 'b', 'c']
    assert f'<th scope="row">b</th><td>{before:.2f}</td><td>{after:.2f}</td>' in page

    # The option file repeats it.
    assert cli.main(['train', '-opt', 'mine/adapt.yml']) == 0
    files = ('mine/net_g_adapted_latest.pth', 'experiments/mine/models/net_g_adapted_latest.pth')
    first, second = (torch.load(folder / file)['params'] for file in files)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (folder / 'mine/report.md').read_text() == report

    # And the weights restore photographs.
    assert cli.main(['upscale', '-i', 'pairs/a_LR.png', '-o', 'a.png', '--weights', files[0]]) == 0
    assert cv2.imread('a.png').shape == (256, 288, 3)

    assert cli.main(command) == 2
    assert 'basicsr: error: -o: mine already exists; choose another folder.' in capsys.readouterr().err


def commands_in(report: str) -> dict[str, list[str]]:
    """The commands that a report ends with, as a shell splits them, by subcommand."""
    lines = (shlex.split(line.split('`')[1]) for line in report.splitlines() if '`basicsr ' in line)
    return {words[1]: words[1:] for words in lines}


@pytest.mark.parametrize('output', ['experiments/cam', 'my camera'])
def test_the_printed_commands_work_wherever_the_output_is(folder, quick, capsys, output):
    command = ['adapt', '--pairs', 'pairs', '--weights', 'w.pth', '-o', output, '--budget', '7']
    assert cli.main(command) == 0
    commands = commands_in(capsys.readouterr().out)
    before = {path: path.read_bytes() for path in (folder / output).rglob('*') if path.is_file()}
    for _ in range(2):  # the second time, the folder of the first one is archived
        assert cli.main(commands['train']) == 0
    assert before == {path: path.read_bytes() for path in (folder / output).rglob('*') if path.is_file()}
    (archived,) = (folder / 'experiments').glob('*_archived_*')
    repeated = archived.with_name(archived.name.partition('_archived_')[0])
    states = [torch.load(path)['params'] for path in folder.rglob('net_g_adapted_latest.pth')]
    assert len(states) == 3 and (repeated / 'models').is_dir()
    assert all(torch.equal(state[name], weight) for state in states for name, weight in states[0].items())
    assert cli.main(['pairs/a_LR.png' if word == 'IN' else word for word in commands['upscale']]) == 0
    assert (folder / 'OUT/a_LR.png').is_file()


MY_NETWORK = """
from basicsr.archs.edsr_arch import EDSR
from basicsr.utils.registry import ARCH_REGISTRY

@ARCH_REGISTRY.register()
class MyNetwork(EDSR):
    pass
"""


def test_networks_of_ones_own(folder, quick, capsys, monkeypatch):
    """The architecture is imported by every command, and in the commands that are printed."""
    network = {**NETWORK, 'type': 'MyNetwork'}
    torch.save({**torch.load('w.pth'), 'network': network}, 'w.pth')
    (folder / 'my_network.py').write_text(MY_NETWORK)
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', dict(ARCH_REGISTRY._obj_map))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    shipped = dict(ARCH_REGISTRY._obj_map)

    def call(*arguments):
        sys.modules.pop('my_network', None)
        monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', dict(shipped))
        return cli.main(list(arguments))

    upscale = ('upscale', '-i', 'pairs/a_LR.png', '-o', 'a.png', '--weights', 'w.pth')
    assert call(*upscale) == 2
    error = capsys.readouterr().err
    assert "w.pth: network_g.type: unknown network 'MyNetwork'" in error and '--import' in error
    assert call(*upscale, '--import', 'nosuchmodule') == 2
    assert "--import nosuchmodule: No module named 'nosuchmodule'" in capsys.readouterr().err
    mine = ('--import', 'my_network')
    assert call(*upscale, *mine) == 0
    assert call('export', '--weights', 'w.pth', '--spandrel', 'mine.pth', *mine) == 0
    adapt = ('adapt', '--pairs', 'pairs', '--weights', 'w.pth', '-o', 'mine', '--budget', '7')
    assert call(*adapt, *mine) == 0
    commands = commands_in(capsys.readouterr().out)
    assert call(*commands['train']) == 0
    trained = capsys.readouterr().out.partition('Restore photographs: basicsr ')[2].splitlines()[0]
    for command in (commands['upscale'], shlex.split(trained)):
        assert command[-2:] == list(mine)
        assert call(*('pairs/b_LR.png' if word == 'IN' else word for word in command)) == 0
    sys.modules.pop('my_network')


class ByBrightness(nn.Module):
    """Adds a number to an image: one for all images, or one for each third of the range of brightness."""

    def __init__(self, num):
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(num))

    def forward(self, lq):
        known = (len(self.offsets) * lq.mean(dim=(1, 2, 3))).long()
        return nn.functional.interpolate(lq, scale_factor=4) + self.offsets[known][:, None, None, None]


@pytest.mark.parametrize(('num', 'helps'), [(1, True), (3, False)])
def test_memorised_images_are_no_gain(folder, quick, monkeypatch, num, helps):
    """All LQ images are darker than their GT by the same amount. A network that memorises images restores no others."""
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', {**ARCH_REGISTRY._obj_map, 'ByBrightness': ByBrightness})
    network = {'type': 'ByBrightness', 'num': num}
    torch.save({'params': ByBrightness(num).state_dict(), 'network': network, 'scale': 4}, 'w.pth')
    options = adapt_model.adaptation_options

    def unmixed(*arguments):  # a mixture would be of the brightness of another pair
        opt = options(*arguments)
        opt['drtl']['adapt'].update(mixup=0, rgb_permutation=0)
        return opt

    monkeypatch.setattr(adapt_model, 'adaptation_options', unmixed)
    for name, brightness in {'a': 50, 'b': 128, 'c': 206}.items():
        gt = cv2.imread(f'pairs/{name}_HR.png').astype(float)
        gt = brightness + 0.15 * (gt - gt.mean())
        lq = cv2.resize(gt, (72, 64), interpolation=cv2.INTER_AREA) - 10
        for side, image in (('HR', gt), ('LR', lq)):
            cv2.imwrite(f'pairs/{name}_{side}.png', np.clip(np.round(image), 0, 255))
    report = module.adapt('pairs', 'w.pth', 'mine', budget=70)
    assert ('Adapting gains nothing on held-out pairs' in report) != helps
    offsets = torch.load('mine/net_g_adapted_latest.pth')['params']['offsets']
    assert (offsets.min() > 0.5 / 255) if helps else torch.equal(offsets, torch.zeros(3))
    mean = next(line for line in report.splitlines() if line.startswith('| **mean** |'))
    before, after = (float(cell) for cell in mean.split('|')[2:4])
    assert after > before if helps else after == before


@pytest.mark.parametrize('num', [3, 1], ids=['pairs', 'quarters of a pair'])
def test_the_report_is_of_networks_that_have_not_seen_the_pair(num):
    """Network k is wrong by k + 1 grey levels: by the PSNR of grey images, which have no other error."""
    gt, lq = (np.full((side, side, 3), 100, np.uint8) for side in (128, 32))
    images = dict.fromkeys('abc'[:num], (gt, lq))
    folds = folds_of([(32, 32)] * num, 5)
    nets = [ByBrightness(1) for _ in [*folds, 'before', 'result']]
    for error, net in enumerate(nets, start=1):
        net.offsets.data.fill_(error / 255)
    *adapted, before, result = nets
    chosen = CrossValidation([], 1e-3, {1.0: 0.5}, 1.0, folds[::-1], adapted[::-1], result)
    evaluations = list(evaluate_folds(chosen, images, TrainedNetwork(before, {'type': 'ByBrightness'}, 4)))
    assert [e.name for e in evaluations] == (list('abc') if num == 3 else [f'a ({k})' for k in range(1, 5)])

    def psnr(error: int) -> float:  # the Y of a grey image has a range of 219 instead of 255
        return 20 * math.log10(255 / (error * 219 / 255))

    assert [e.after['psnr_y'] for e in evaluations] == pytest.approx([psnr(k + 1) for k in range(len(folds))], abs=1e-2)
    assert [e.before['psnr_y'] for e in evaluations] == pytest.approx([psnr(len(folds) + 1)] * len(folds), abs=1e-2)


def test_a_failed_evaluation_leaves_what_was_adapted(folder, quick, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'evaluate_folds', fail)
    with pytest.raises(KeyboardInterrupt):
        module.adapt('pairs', 'w.pth', 'mine', budget=7)
    assert (folder / 'mine/net_g_adapted_latest.pth').is_file()


def test_pairs_that_lie_apart(folder, quick):
    lq, gt = pair(shift=(5, 3))
    cv2.imwrite('pairs/d_LR.png', lq)
    cv2.imwrite('pairs/d_HR.png', gt)
    with pytest.raises(DataError, match=r'd_HR\.png and .*d_LR\.png are misaligned by up to 5\.9 LQ pixels; .*--reg'):
        module.adapt('pairs', 'w.pth', 'mine')
    assert not (folder / 'mine').exists()
    report = module.adapt('pairs', 'w.pth', 'mine', budget=8, registers=True)
    row, _ = (line for line in report.splitlines() if line.startswith('| d |'))  # of alignment, and of evaluation
    assert [float(cell) for cell in row.split('|')[2:5]] == pytest.approx([5, 3, 1], abs=0.03)
    poor, good = (cv2.imread(f'mine/pairs/{side}/d.png') for side in ('lq', 'gt'))
    reduced = cv2.resize(good, poor.shape[1::-1], interpolation=cv2.INTER_AREA).astype(float)
    assert np.abs(reduced - poor).mean() < 3


def test_pairs_of_16_bits(folder, quick):
    note = '16-bit images were reduced to 8 bits, since BasicSR trains on 8 bits.'
    assert note not in module.adapt('pairs', 'w.pth', 'other', budget=7)
    for path in (folder / 'pairs').iterdir():
        cv2.imwrite(str(path), cv2.imread(str(path)).astype(np.uint16) * 257)
    assert note in module.adapt('pairs', 'w.pth', 'mine', budget=7)
    for side in ('gt', 'lq'):
        images = (cv2.imread(f'{output}/pairs/{side}/a.png', cv2.IMREAD_UNCHANGED) for output in ('other', 'mine'))
        assert np.array_equal(*images)


def test_pairs_of_different_colours(folder, quick):
    Image.open('pairs/a_LR.png').save('pairs/a_LR.png', icc_profile=display_p3())
    with pytest.raises(
        DataError, match=r'--pairs: .*a_HR\.png \(no profile, i.e. sRGB\) and .*a_LR\.png \(Display P3\)'
    ):
        module.adapt('pairs', 'w.pth', 'mine')
    assert not (folder / 'mine').exists()


def resize(factor: float, pattern: str) -> None:
    for path in Path('pairs').glob(pattern):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), None, fx=factor, fy=factor))


def swap() -> None:
    """LQ for GT and GT for LQ, in two folders."""
    for suffix, side in (('LR', 'gt'), ('HR', 'lq')):
        Path('pairs', side).mkdir()
        for path in Path('pairs').glob(f'*_{suffix}.png'):
            path.rename(Path('pairs', side, path.name.replace(f'_{suffix}', '')))


@pytest.mark.parametrize('registers', [False, True])
@pytest.mark.parametrize(
    'change, message',
    [
        (swap, r'pairs/lq/a\.png.* is 288x256, larger than .*72x64; are the folders pairs/gt and pairs/lq swapped\?$'),
        (
            lambda: resize(3 / 4, '*_HR.png'),
            r'a_HR\.png is 216x192, .* is 72x64: these pairs are x3, but the weights are for x4',
        ),
        (
            lambda: resize(4, '*_LR.png'),
            r'a_HR\.png is 288x256, .* is 288x256: these pairs are x1, but the weights are for x4',
        ),
    ],
)
def test_sizes_that_tell_what_is_wrong(folder, quick, change, message, registers):
    change()
    with pytest.raises(DataError, match=message):
        module.adapt('pairs', 'w.pth', 'mine', registers=registers)
    assert not (folder / 'mine').exists()


def test_cropped_photographs_are_registered(folder, quick):
    """Although their sizes are those of x3 pairs."""
    lq, gt = pair()
    cv2.imwrite('pairs/d_LR.png', lq[:160, :160])
    cv2.imwrite('pairs/d_HR.png', gt[:480, :480])
    report = module.adapt('pairs', 'w.pth', 'mine', budget=8, registers=True)
    row, _ = (line for line in report.splitlines() if line.startswith('| d |'))  # of alignment, and of evaluation
    assert float(row.split('|')[4]) == pytest.approx(1, abs=1e-3)


def test_the_folder_of_the_weights_scale_is_found(folder, quick):
    """As City100 is laid out for several scales."""
    for suffix, side in (('LR', 'lr_x4'), ('HR', 'hr')):
        Path('pairs', side).mkdir()
        for path in Path('pairs').glob(f'*_{suffix}.png'):
            path.rename(Path('pairs', side, path.name.replace(f'_{suffix}', '')))
    Path('pairs/lr_x3').mkdir()
    module.adapt('pairs', 'w.pth', 'mine', budget=7)
    assert np.array_equal(cv2.imread('mine/pairs/lq/a.png'), cv2.imread('pairs/lr_x4/a.png'))


def test_progress_is_shown_without_a_terminal(folder, quick, monkeypatch, capsys):
    monkeypatch.setattr(progress, '_FIRST', 0)
    monkeypatch.setattr(progress, '_INTERVAL', 0)
    module.adapt('pairs', 'w.pth', 'mine', budget=7)
    error = capsys.readouterr().err
    assert re.findall(r': alignment: (\d) of 3 pairs\n', error) == ['1', '2', '3']
    assert re.findall(r': adaptation: (\d) of 7 steps\n', error) == list('1234567')
    assert re.findall(r': evaluation: (\d) of 3 images\n', error) == ['1', '2', '3']
    assert ': Adapting to the target (3 pairs, 3 folds, 7 steps).\n' in error


@pytest.mark.parametrize(('num', 'parts'), [(1, 4), (2, 4)])
def test_few_pairs_are_judged_in_parts(folder, quick, num, parts):
    for name in 'abc'[num:]:
        for side in ('LR', 'HR'):
            (folder / f'pairs/{name}_{side}.png').unlink()
    report = module.adapt('pairs', 'w.pth', 'mine', budget=8)
    rows = re.findall(r'^\| ([abc]) \((\d)\) \|', report, re.MULTILINE)
    assert rows == [(name, str(i)) for name in 'abc'[:num] for i in range(1, parts // num + 1)]


@pytest.mark.parametrize(
    'change, options, error, message',
    [
        (
            lambda: cv2.imwrite('pairs/a_HR.png', np.zeros((256, 288, 3))),
            {},
            DataError,
            'do not show the same',
        ),
        (
            lambda: cv2.imwrite('pairs/a_HR.png', np.zeros((255, 288, 3))),
            {},
            DataError,
            'should be 4 times as',
        ),
        (lambda: open('pairs/a_HR.png', 'wb').close(), {}, DataError, r'a_HR\.png: cannot be read as an image'),
        (lambda: damaged_png(Path('pairs/a_LR.png')), {}, DataError, r'^pairs/a_LR\.png: cannot be read as an image'),
        (lambda: damaged_png(Path('pairs/b_HR.png')), {}, DataError, r'^pairs/b_HR\.png: cannot be read as an image'),
        (lambda: None, {'budget': 6}, OptionError, '--budget must be at least 7, a step of each adaptation'),
        (lambda: None, {'auxiliary': 'none'}, DataError, '--auxiliary: there is no folder none'),
    ],
)
def test_wrong_input(folder, quick, change, options, error, message):
    change()
    with pytest.raises(error, match=message):
        module.adapt('pairs', 'w.pth', 'mine', **options)
    assert not (folder / 'mine').exists()
