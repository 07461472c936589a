"""``basicsr upscale``: photographs of all kinds, tiles, and what fails."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from PIL import Image, ImageOps
from skimage import data

from drtl_plugin.api.upscale import upscale
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.runtime.trained_network import TrainedNetwork, load_trained

OPTIONS = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'upscale': 2, 'res_scale': 1}
COFFEE = data.coffee()[100:150, 200:270]


@pytest.fixture
def network():
    """Bicubic-like, with something of its own, so that channels, tiles and ranges can be told apart."""
    torch.manual_seed(0)
    net = build_network(OPTIONS)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.8)
    return TrainedNetwork(net.eval(), OPTIONS, 2)


def restored(network: TrainedNetwork, rgb: np.ndarray) -> np.ndarray:
    """RGB ``(H, W, 3)`` in [0, 1], by the network itself."""
    with torch.no_grad():
        output = network.net(torch.from_numpy(rgb.astype(np.float32)).permute(2, 0, 1)[None])
    return output[0].permute(1, 2, 0).clamp(0, 1).numpy()


def test_colour(tmp_path, network):
    Image.fromarray(COFFEE).save(tmp_path / 'a.png')
    written, failed = upscale(network, str(tmp_path / 'a.png'), str(tmp_path / 'out'))
    assert (written, failed) == ([tmp_path / 'out/a.png'], [])
    result = np.asarray(Image.open(written[0]))
    assert np.array_equal(result, np.round(restored(network, COFFEE / 255) * 255))
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['a.png']


@pytest.mark.parametrize('tile', [16, 23, 64])
def test_tiles_make_the_whole_image(tmp_path, network, tile):
    """The network reaches 7 pixels."""
    Image.fromarray(COFFEE).save(tmp_path / 'a.png')
    for name, size in (('whole', 0), ('tiles', tile)):
        upscale(network, str(tmp_path / 'a.png'), str(tmp_path / name), tile=size, overlap=8)
    whole, tiles = (cv2.imread(str(tmp_path / name / 'a.png')).astype(int) for name in ('whole', 'tiles'))
    assert np.abs(whole - tiles).max() <= 1  # round-off at a half
    assert (whole != tiles).mean() < 1e-3


def test_16_bits_stay(tmp_path, network):
    rgb = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), np.uint16)
    cv2.imwrite(str(tmp_path / 'a.png'), rgb[..., ::-1])
    upscale(network, str(tmp_path / 'a.png'), str(tmp_path / 'b.tif'))
    result = cv2.imread(str(tmp_path / 'b.tif'), cv2.IMREAD_UNCHANGED)
    assert result.dtype == np.uint16
    assert np.abs(result[..., ::-1] / 65535 - restored(network, rgb / 65535)).max() < 1 / 65535
    upscale(network, str(tmp_path / 'a.png'), str(tmp_path / 'b.webp'))
    assert cv2.imread(str(tmp_path / 'b.webp'), cv2.IMREAD_UNCHANGED).dtype == np.uint8


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_grey_stays_grey(tmp_path, network, dtype):
    peak = np.iinfo(dtype).max
    grey = np.random.default_rng(0).integers(0, peak, (20, 30), dtype)
    cv2.imwrite(str(tmp_path / 'a.png'), grey)
    upscale(network, str(tmp_path / 'a.png'), str(tmp_path / 'out'))
    result = cv2.imread(str(tmp_path / 'out/a.png'), cv2.IMREAD_UNCHANGED)
    wanted = restored(network, np.repeat(grey[..., None] / peak, 3, axis=-1)).mean(axis=-1)
    assert result.dtype == dtype
    assert np.abs(result / peak - wanted).max() < 1 / peak


def test_alpha_is_restored_too(tmp_path, network):
    alpha = np.tile(np.linspace(0, 255, 70, dtype=np.uint8), (50, 1))
    Image.fromarray(np.dstack([COFFEE, alpha])).save(tmp_path / 'a.png')
    (written,), _ = upscale(network, str(tmp_path / 'a.png'), str(tmp_path / 'b.jpg'))
    assert written == tmp_path / 'b.png'  # which has alpha
    result = np.asarray(Image.open(written))
    assert np.array_equal(result[..., :3], np.round(restored(network, COFFEE / 255) * 255))
    wanted = restored(network, np.repeat(alpha[..., None] / 255, 3, axis=-1)).mean(axis=-1)
    assert np.abs(result[..., 3] / 255 - wanted).max() < 1 / 255


@pytest.mark.parametrize('source, target, ext', [('in/a.png', 'in/a.jpg', 'auto'), ('in', 'in', 'jpg')])
def test_alpha_takes_no_photographs_place(tmp_path, monkeypatch, network, source, target, ext):
    monkeypatch.chdir(tmp_path)
    Path('in').mkdir()
    Image.fromarray(np.dstack([COFFEE, COFFEE[..., 0]])).save('in/a.png')
    before = Path('in/a.png').read_bytes()
    written, (line,) = upscale(network, source, target, ext=ext)
    assert not written
    assert line == 'in/a.png: has an alpha channel and would become in/a.png, which is taken; use --suffix.'
    assert Path('in/a.png').read_bytes() == before
    assert [path.name for path in Path('in').iterdir()] == ['a.png']


def test_two_images_with_alpha_do_not_become_one(tmp_path, network):
    (tmp_path / 'in').mkdir()
    for suffix in ('png', 'webp'):
        Image.fromarray(np.dstack([COFFEE, COFFEE[..., 0]])).save(tmp_path / f'in/a.{suffix}')
    Image.fromarray(COFFEE).save(tmp_path / 'in/b.png')
    with pytest.raises(DataError, match='would both become'):
        upscale(network, str(tmp_path / 'in'), str(tmp_path / 'out'), ext='jpg')


@pytest.mark.parametrize('orientation', range(1, 9))
def test_alpha_is_turned_upright_as_pillow_does(tmp_path, network, capsys, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.dstack([COFFEE, COFFEE[..., 0]])).save(tmp_path / 'a.png', exif=exif)
    upscale(network, str(tmp_path / 'a.png'), str(tmp_path / 'out'))
    turned = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / 'a.png')))
    result = np.asarray(Image.open(tmp_path / 'out/a.png'))
    assert np.array_equal(result[..., :3], np.round(restored(network, turned[..., :3] / 255) * 255))
    assert result.shape[-1] == 4
    assert 'dropped' not in capsys.readouterr().err


def test_infinite_results_are_no_images(tmp_path, network):
    Image.fromarray(COFFEE).save(tmp_path / 'a.png')
    with torch.no_grad():
        network.net.conv_last.bias.fill_(np.nan)
    written, (line,) = upscale(network, str(tmp_path / 'a.png'), str(tmp_path / 'out'))
    assert not written
    assert 'the network returns infinite or undefined numbers' in line


def test_photographs_are_restored_upright(tmp_path, network):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COFFEE).save(tmp_path / 'a.jpg', exif=exif, quality=100)
    upscale(network, str(tmp_path / 'a.jpg'), str(tmp_path / 'out'), ext='png')
    assert np.asarray(Image.open(tmp_path / 'out/a.png')).shape == (140, 100, 3)


def test_a_broken_image_does_not_keep_the_others(tmp_path, network, capsys):
    (tmp_path / 'in').mkdir()
    for name in ('a', 'ä b', 'c'):
        Image.fromarray(COFFEE).save(tmp_path / f'in/{name}.png')
    (tmp_path / 'in/broken.png').write_bytes((tmp_path / 'in/a.png').read_bytes()[:100])
    (tmp_path / 'in/empty.jpg').touch()
    (tmp_path / 'in/notes.txt').write_text('none')
    written, failed = upscale(network, str(tmp_path / 'in'), str(tmp_path / 'out'), suffix='_x2', ext='webp')
    assert sorted(path.name for path in written) == ['a_x2.webp', 'c_x2.webp', 'ä b_x2.webp']
    assert {line.split(':')[0] for line in failed} == {str(tmp_path / 'in/broken.png'), str(tmp_path / 'in/empty.jpg')}
    assert 'broken.png: cannot be read as an image' in capsys.readouterr().err
    assert sorted((tmp_path / 'out').iterdir()) == sorted(written)


class SquareOnly(torch.nn.Upsample):
    """As networks with windows that assert their sizes."""

    def forward(self, x):
        assert x.shape[-1] == x.shape[-2]
        return super().forward(x)


def test_an_image_that_the_network_refuses_does_not_keep_the_others(tmp_path, capsys):
    for name, width in (('a', 30), ('b', 20)):
        Image.fromarray(COFFEE[:20, :width]).save(tmp_path / f'{name}.png')
    network = TrainedNetwork(SquareOnly(scale_factor=2), {'type': 'SquareOnly'}, 2)
    written, (line,) = upscale(network, str(tmp_path), str(tmp_path / 'out'))
    assert [path.name for path in written] == ['b.png']
    number = SquareOnly.forward.__code__.co_firstlineno + 1
    assert line.startswith(f'{tmp_path}/a.png: AssertionError') and line.endswith(f' ({__file__}:{number})')
    assert capsys.readouterr().err == f'basicsr: warning: {line}\n'


@pytest.mark.parametrize('size', [(1, 1), (3, 5), (8, 8), (9, 17)])
def test_images_smaller_than_a_window(tmp_path, size):
    options = {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'scale': 1, 'num_feat': 4, 'num_block': 1}
    options['num_grow_ch'] = 4
    net = build_network(options).eval()  # wants multiples of 4
    Image.fromarray(COFFEE[: size[0], : size[1]]).save(tmp_path / 'a.png')
    _, failed = upscale(TrainedNetwork(net, options, 1), str(tmp_path / 'a.png'), str(tmp_path / 'out'))
    assert not failed
    assert cv2.imread(str(tmp_path / 'out/a.png')).shape[:2] == size


@pytest.mark.parametrize(
    'source, target, options, error, message',
    [
        (
            'a.png',
            '.',
            {},
            DataError,
            r'a\.png is an input image; choose another folder, or a --suffix',
        ),
        ('.', '../in', {}, DataError, 'is an input image'),
        ('.', 'out', {'ext': 'bmp'}, DataError, r'a\.png and a\.webp would both become out/a\.bmp; use --ext auto'),
        ('none', 'out', {}, DataError, '-i: there is no none'),
        ('sub', 'out', {}, DataError, '-i: sub contains no images'),
        ('a.png', 'a.doc', {}, OptionError, r'-o: a\.doc is none of the formats \.png'),
        ('a.png', 'out', {'ext': 'doc'}, OptionError, "--ext: 'doc' is none of auto, png"),
        ('a.png', 'out', {'suffix': '/../x'}, OptionError, '--suffix: .* must be part of a name'),
        ('a.png', 'out', {'tile': -1}, OptionError, '--tile and --overlap must not be below 0'),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, network, source, target, options, error, message):
    (tmp_path / 'in/sub').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'in')
    Image.fromarray(COFFEE).save('a.png')
    Image.fromarray(COFFEE).save('a.webp')
    before = {path: path.read_bytes() for path in Path().glob('*.*')}
    with pytest.raises(error, match=message):
        upscale(network, source, target, **options)
    assert before == {path: path.read_bytes() for path in Path().glob('*.*')}


_LARGE = """
import resource, sys
import drtl_plugin
from drtl_plugin.runtime.trained_network import load_trained
from drtl_plugin.api.upscale import upscale
network = load_trained('w.pth')
upscale(network, 'small.png', 'out')
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, failed = upscale(network, 'large.png', 'out')
print(len(failed), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path, network):
    """12,000 × 8,000 pixels: what is beyond the image, its file and the result does not grow with it."""
    torch.save({'params': network.net.state_dict(), 'network': OPTIONS, 'scale': 2}, tmp_path / 'w.pth')
    assert load_trained(str(tmp_path / 'w.pth')).scale == 2
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (800, 1200, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'small.png'), small)
    large = cv2.resize(small, (12000, 8000))
    cv2.imwrite(str(tmp_path / 'large.png'), large, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    result = subprocess.run(
        [sys.executable, '-c', _LARGE], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    # MiB: the image and its copy upright, its file, the result and what OpenCV keeps of it while writing.
    images = (2 * large.nbytes + (tmp_path / 'large.png').stat().st_size + 4 * large.nbytes) / 2**20
    assert result[0] == '0'
    assert float(result[1]) < images + 200
    assert cv2.imread(str(tmp_path / 'out/large.png')).shape == (16000, 24000, 3)
