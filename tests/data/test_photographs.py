"""Photographs with colour profiles and metadata: what ``basicsr upscale`` keeps, as other programs see it."""

import json
import shutil
import struct
import subprocess
import time
import zlib
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from skimage import data

from drtl_plugin.api.upscale import upscale
from drtl_plugin.data.photographs import Metadata, colour_space, has_16_bits, require_same_profile, write_photograph
from drtl_plugin.errors import DataError
from drtl_plugin.runtime.trained_network import TrainedNetwork

COFFEE = data.coffee()[100:150, 200:270]
P3 = {'rXYZ': (0.51512, 0.24120, -0.00105), 'gXYZ': (0.29198, 0.69225, 0.04189), 'bXYZ': (0.15710, 0.06657, 0.78407)}
RDF = 'http://www.w3.org/1999/02/22-rdf-syntax-ns#'
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


@pytest.fixture
def network():
    """Repeats pixels."""
    return TrainedNetwork(torch.nn.Upsample(scale_factor=2, mode='nearest'), {'type': 'nearest'}, 2)


def s15f16(*values: float) -> bytes:
    return struct.pack(f'>{len(values)}i', *(round(value * 65536) for value in values))


def icc(space: str, name: str, tags: dict[str, bytes], pcs: str = 'XYZ ') -> bytes:
    """An ICC profile of version 4."""

    def text(content: str) -> bytes:
        encoded = content.encode('utf-16-be')
        return b'mluc' + struct.pack('>IIIHHII', 0, 1, 12, 0x656E, 0x5553, len(encoded), 28) + encoded

    tags = {'desc': text(name), 'cprt': text('none'), 'wtpt': b'XYZ \0\0\0\0' + s15f16(0.9642, 1, 0.8249), **tags}
    table, values = struct.pack('>I', len(tags)), b''
    for tag, value in tags.items():
        offset = 128 + 4 + 12 * len(tags) + len(values)
        table += tag.encode() + struct.pack('>II', offset, len(value))
        values += value + bytes(-len(value) % 4)
    kind = b'prtr' if space == 'CMYK' else b'mntr'
    start = struct.pack('>I4sI4s4s4s', 0, bytes(4), 0x04000000, kind, space.encode(), pcs.encode())
    start += bytes(12) + b'acsp' + bytes(28) + s15f16(0.9642, 1, 0.8249)
    profile = start + bytes(128 - len(start)) + table + values
    return struct.pack('>I', len(profile)) + profile[4:]


def display_p3(name: str = 'Display P3', filler: int = 0) -> bytes:
    curve = b'para' + struct.pack('>IHH', 0, 3, 0) + s15f16(*SRGB_CURVE)
    tags = {tag: b'XYZ \0\0\0\0' + s15f16(*value) for tag, value in P3.items()}
    large = {'targ': b'text\0\0\0\0' + b'x' * filler + b'\0'} if filler else {}
    return icc('RGB ', name, {**tags, 'rTRC': curve, 'gTRC': curve, 'bTRC': curve, **large})


def grey_profile() -> bytes:
    return icc('GRAY', 'Gamma 1.8', {'kTRC': b'curv' + struct.pack('>IIH', 0, 1, round(1.8 * 256))})


def cmyk_profile() -> bytes:
    """All inks are grey: half of the lightness each."""
    lab = [(round(255 * 0.5 ** bin(inks).count('1')), 128, 128) for inks in range(16)]
    identity = bytes(range(256))
    lut = b'mft1' + struct.pack('>IBBBB', 0, 4, 3, 2, 0) + s15f16(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return icc('CMYK', 'grey inks', {'A2B0': lut + identity * 4 + bytes(np.ravel(lab).tolist()) + identity * 3}, 'Lab ')


def exiftool(*arguments: object) -> str:
    if shutil.which('exiftool') is None:
        pytest.skip('exiftool is not installed')
    command = ['exiftool', *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def magick(*arguments: object) -> str:
    program = shutil.which('magick') or shutil.which('convert')
    if program is None:
        pytest.skip('ImageMagick is not installed')
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def photograph(path: Path, pixels: np.ndarray, profile: bytes) -> Path:
    """An image with a profile and metadata, written by exiftool."""
    cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    Image.fromarray(COFFEE).resize((16, 12)).save(path.parent / 'thumbnail.jpg')
    (path.parent / 'profile.icc').write_bytes(profile)
    exiftool(
        *('-q', '-overwrite_original', f'-ICC_Profile<={path.parent}/profile.icc', '-Make=Maker', '-Model=Camera 1'),
        *('-DateTimeOriginal=2024:05:06 07:08:09', '-ExposureTime=1/250', '-UserComment=a comment', '-ISO=200'),
        *('-GPSLatitude=48.5', '-GPSLatitudeRef=N', '-GPSLongitude=11.25', '-GPSLongitudeRef=W', '-XResolution=240'),
        *('-YResolution=240', '-Copyright=© Müller', '-EXIF:Orientation#=6', '-ExifImageWidth=70', '-XMP-dc:Title=A'),
        *('-ExifImageHeight=50', '-XMP-xmp:Rating=4', '-XMP-tiff:Orientation#=6', '-XMP-exif:ExifImageWidth=70'),
        f'-ThumbnailImage<={path.parent}/thumbnail.jpg',
        path,
    )
    for name in ('profile.icc', 'thumbnail.jpg'):
        (path.parent / name).unlink()
    return path


KEPT = {
    'IFD0:Make': 'Maker',
    'IFD0:Model': 'Camera 1',
    'IFD0:Copyright': '© Müller',
    'IFD0:Orientation': 1,
    'IFD0:XResolution': 240,
    'ExifIFD:DateTimeOriginal': '2024:05:06 07:08:09',
    'ExifIFD:ExposureTime': 0.004,
    'ExifIFD:ISO': 200,
    'ExifIFD:UserComment': 'a comment',
    'ExifIFD:ExifImageWidth': 100,
    'ExifIFD:ExifImageHeight': 140,
    'GPS:GPSLatitude': 48.5,
    'GPS:GPSLongitude': 11.25,
    'GPS:GPSLongitudeRef': 'W',
    'XMP-dc:Title': 'A',
    'XMP-xmp:Rating': 4,
    'XMP-tiff:Orientation': 1,
    'ICC_Profile:ProfileDescription': 'Display P3',
}


@pytest.mark.parametrize(
    'source, target',
    [('jpg', 'jpg'), ('jpg', 'tif'), ('png', 'webp'), ('tif', 'jpg'), ('tif', 'png'), ('tif', 'tif'), ('webp', 'png')],
)
def test_metadata_is_kept(tmp_path, network, capsys, source, target):
    profile = display_p3(filler=100_000)  # more than a segment of a JPEG file holds
    path = photograph(tmp_path / f'a.{source}', COFFEE, profile)
    (result,), failed = upscale(network, str(path), str(tmp_path / f'b.{target}'))
    assert not failed
    assert 'warning' not in capsys.readouterr().err
    (found,) = json.loads(exiftool('-j', '-n', '-G1', result))
    assert {key: found.get(key) for key in KEPT} == KEPT
    assert not [key for key in found if 'Thumbnail' in key or 'PreviewImage' in key or 'XMP-exif' in key]
    extracted = subprocess.run(['exiftool', '-b', '-ICC_Profile', result], capture_output=True, check=True).stdout
    assert extracted == profile
    problems = exiftool('-s3', '-a', '-validate', '-warning', '-error', result).splitlines()[1:]
    # Neither a tag that the original lacks, too, nor one that is unusual in TIFF is damage.
    assert not [line for line in problems if not line.startswith(('Missing required', '[minor]'))]
    assert Image.open(result).size == (100, 140)


@pytest.mark.parametrize('suffix, target', [('png', 'png'), ('png', 'tif'), ('tif', 'png'), ('tif', 'tif')])
def test_16_bits_are_kept_with_the_profile(tmp_path, network, suffix, target):
    pixels = np.random.default_rng(0).integers(0, 65536, (50, 70, 3), np.uint16)
    path = photograph(tmp_path / f'a.{suffix}', pixels, display_p3())
    (result,), _ = upscale(network, str(path), str(tmp_path / f'b.{target}'))
    assert magick(result, '-format', '%[bit-depth] %w %h %[icc:description]', 'info:') == '16 100 140 Display P3'
    turned = np.rot90(pixels, -1).repeat(2, 0).repeat(2, 1)
    magick(result, '-depth', 16, '-endian', 'LSB', f'rgb:{tmp_path}/pixels')
    assert np.array_equal(np.fromfile(tmp_path / 'pixels', '<u2').reshape(turned.shape), turned)


def test_wide_colours_are_the_same_to_other_programs(tmp_path, network):
    path = photograph(tmp_path / 'a.jpg', COFFEE, display_p3())
    (tmp_path / 'sRGB.icc').write_bytes(SRGB)
    (result,), _ = upscale(network, str(path), str(tmp_path / 'b.png'))
    for image in (path, result):
        magick(image, '-auto-orient', '-profile', tmp_path / 'sRGB.icc', '-depth', 8, f'rgb:{image}.rgb')
    original = np.fromfile(f'{path}.rgb', np.uint8).reshape(70, 50, 3).repeat(2, 0).repeat(2, 1)
    restored = np.fromfile(f'{result}.rgb', np.uint8).reshape(140, 100, 3)
    assert np.abs(original.astype(int) - restored).max() <= 1
    unconverted = np.rot90(np.asarray(Image.open(path)), -1).repeat(2, 0).repeat(2, 1)
    assert np.abs(original.astype(int) - unconverted).max() > 10  # the profile matters


def test_metadata_without_other_programs(tmp_path, network):
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: 'Maker', 0x0100: 70})
    exif.get_ifd(0x8769).update({0x9003: '2024:05:06 07:08:09', 0xA002: 70})
    Image.fromarray(COFFEE).save(tmp_path / 'a.jpg', exif=exif, icc_profile=display_p3(), dpi=(240, 240))
    (result,), _ = upscale(network, str(tmp_path / 'a.jpg'), str(tmp_path / 'b.jpg'))
    with Image.open(result) as image:
        assert image.size == (100, 140)
        assert image.info['icc_profile'] == display_p3()
        found = image.getexif()
        assert dict(found.get_ifd(0x8769)) == {0x9003: '2024:05:06 07:08:09', 0xA002: 100}
        assert {tag: value for tag, value in found.items() if tag != 0x8769} == {0x0112: 1, 0x010F: 'Maker'}


def test_resolution_of_an_image_without_exif(tmp_path, network):
    Image.fromarray(COFFEE).save(tmp_path / 'a.png', dpi=(300, 300))
    (result,), _ = upscale(network, str(tmp_path / 'a.png'), str(tmp_path / 'b.tif'))
    assert Image.open(result).info['dpi'] == pytest.approx((300, 300), abs=0.1)


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('suffix', ['png', 'tif', 'jpg'])
def test_grey_profiles_stay_with_grey_images(tmp_path, network, suffix, dtype):
    grey = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (20, 30)).astype(dtype)
    path = photograph(tmp_path / 'a.png', grey, grey_profile())
    (result,), _ = upscale(network, str(path), str(tmp_path / f'b.{suffix}'))
    with Image.open(result) as image:
        assert image.info['icc_profile'] == grey_profile()
        assert image.mode in ('L', 'I;16')


@pytest.mark.parametrize('mode, profile', [('L', display_p3()), ('RGB', grey_profile()), ('RGB', b'damaged' * 30)])
@pytest.mark.parametrize('suffix', ['png', 'jpg'])
def test_profiles_that_do_not_fit_are_dropped(tmp_path, network, capsys, suffix, mode, profile):
    Image.fromarray(COFFEE).convert(mode).save(tmp_path / 'a.jpg', icc_profile=profile)
    (result,), _ = upscale(network, str(tmp_path / 'a.jpg'), str(tmp_path / f'b.{suffix}'))
    assert 'icc_profile' not in Image.open(result).info
    assert f'basicsr: warning: results lack colour profile (b.{suffix})' in capsys.readouterr().err


@pytest.mark.parametrize('suffix', ['jpg', 'tif'])
def test_cmyk_is_converted_through_its_profile(tmp_path, network, suffix):
    cmyk = Image.new('CMYK', (8, 8), (255, 0, 0, 0))
    cmyk.save(tmp_path / f'a.{suffix}', icc_profile=cmyk_profile())
    (result,), _ = upscale(network, str(tmp_path / f'a.{suffix}'), str(tmp_path / 'b.png'))
    with Image.open(result) as image:
        assert colour_space(image.info['icc_profile']) == 'RGB'
        # Half the lightness is (119, 119, 119); without the profile, cyan would be (0, 255, 255).
        assert np.abs(np.asarray(image).astype(int) - 119).max() <= 4
        assert image.mode == 'RGB'


def test_cmyk_without_a_profile_has_no_alpha(tmp_path, network):
    Image.new('CMYK', (8, 8), (255, 0, 0, 0)).save(tmp_path / 'a.tif')
    (result,), _ = upscale(network, str(tmp_path / 'a.tif'), str(tmp_path / 'b.tif'))
    assert np.asarray(Image.open(result))[0, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize('orientation', [1, 6])
@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_tiffs_with_alpha_keep_their_colours(tmp_path, network, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.dstack([COFFEE, COFFEE[..., 0]])).convert(mode)
    image.save(tmp_path / 'a.tif', exif=exif)
    (result,), _ = upscale(network, str(tmp_path / 'a.tif'), str(tmp_path / 'b.tif'))
    wanted = np.rot90(np.asarray(image.convert('RGBA')), -1 if orientation == 6 else 0).repeat(2, 0).repeat(2, 1)
    with Image.open(result) as restored:
        assert restored.tag_v2[338] == (2,)
        assert np.array_equal(np.asarray(restored), wanted)


def test_one_line_says_what_formats_cannot_hold(tmp_path, network, capsys):
    (tmp_path / 'in').mkdir()
    exif = Image.Exif()
    exif[0x010F] = 'Maker'
    for name in 'abcde':
        Image.fromarray(COFFEE).save(tmp_path / f'in/{name}.jpg', exif=exif, icc_profile=display_p3())
    cv2.imwrite(str(tmp_path / 'in/f.png'), COFFEE.astype(np.uint16))
    upscale(network, str(tmp_path / 'in'), str(tmp_path / 'out'), ext='bmp')
    (line,) = (line for line in capsys.readouterr().err.splitlines() if 'warning' in line)
    assert line == (
        'basicsr: warning: results lack EXIF (a.bmp, b.bmp, c.bmp and 2 more), colour profile (a.bmp, b.bmp, c.bmp and '
        '2 more), bits beyond 8 (f.bmp); PNG and TIFF hold the most (--ext png).'
    )
    assert len(list((tmp_path / 'out').iterdir())) == 6


def test_xmp_of_gain_maps_is_dropped(tmp_path, network, capsys):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:h="http://ns.adobe.com/hdr-gain-map/1.0/"/>'
    Image.fromarray(COFFEE).save(tmp_path / 'a.jpg', xmp=xmp)
    (result,), _ = upscale(network, str(tmp_path / 'a.jpg'), str(tmp_path / 'b.jpg'))
    assert b'gain-map' not in result.read_bytes()
    assert 'results lack XMP of gain maps, depth or video (b.jpg)' in capsys.readouterr().err


def test_sizes_and_thumbnails_of_the_original_leave_xmp(tmp_path):
    stale = '<xmp:Thumbnails><rdf:Alt>{}</rdf:Alt></xmp:Thumbnails>'.format('<rdf:li>a &gt; b</rdf:li>' * 3)
    stale += '<exif:PixelXDimension >70</exif:PixelXDimension><tiff:ImageWidth>70</tiff:ImageWidth>'
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/" '
        'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmp:Rating="4" exif:PixelYDimension="50" tiff:Orientation="6" '
        "tiff:ImageLength = '50'>{}<xmp:Label>red</xmp:Label></rdf:Description></rdf:RDF></x:xmpmeta>"
    )
    metadata = Metadata(xmp=xmp.format(stale).encode())
    assert not write_photograph(tmp_path / 'a.jpg', np.ascontiguousarray(COFFEE), metadata)
    with Image.open(tmp_path / 'a.jpg') as image:
        (written,) = ElementTree.fromstring(image.info['xmp']).iter(f'{{{RDF}}}Description')
    assert {name.partition('}')[2]: value for name, value in written.attrib.items()} == {
        'Rating': '4',
        'Orientation': '1',
    }
    assert [(child.tag.partition('}')[2], child.text) for child in written] == [('Label', 'red')]


@pytest.mark.parametrize(
    'piece', [b'<xmp:Thumbnails>', b'<xmp:Thumbnails ', b' tiff:ImageWidth="\'', b'</xmp:Thumbnails>']
)
def test_malformed_xmp_takes_no_time(tmp_path, piece):
    metadata = Metadata(xmp=piece * (2**18 // len(piece)))
    started = time.process_time()
    write_photograph(tmp_path / 'a.tif', np.ascontiguousarray(COFFEE), metadata)
    assert time.process_time() - started < 1


@pytest.mark.parametrize('size', [2**32 - 1, 0])
def test_a_resolution_that_makes_no_sense_leaves_the_other_metadata(tmp_path, network, capsys, size):
    Image.fromarray(COFFEE).save(tmp_path / 'a.png', icc_profile=display_p3(), dpi=(300, 300))
    content = (tmp_path / 'a.png').read_bytes()
    start = content.index(b'pHYs')
    chunk = b'pHYs' + struct.pack('>IIB', size, size, 1)
    (tmp_path / 'a.png').write_bytes(
        content[:start] + chunk + struct.pack('>I', zlib.crc32(chunk)) + content[start + len(chunk) + 4 :]
    )
    (result,), _ = upscale(network, str(tmp_path / 'a.png'), str(tmp_path / 'b.tif'))
    assert 'warning' not in capsys.readouterr().err
    assert Image.open(result).info['icc_profile'] == display_p3()


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        write_photograph(tmp_path / 'gone/a.png', np.ascontiguousarray(COFFEE), Metadata())
    assert str(caught.value) == f'{tmp_path}/gone/a.png cannot be written.'


def test_metadata_follows_an_upscaled_result_again(tmp_path, network):
    """Results are photographs, too."""
    path = photograph(tmp_path / 'a.tif', COFFEE, display_p3())
    for name in ('b.tif', 'c.png', 'd.webp', 'e.jpg', 'f.tif'):
        (path,), failed = upscale(network, str(path), str(tmp_path / name))
        assert not failed
    (found,) = json.loads(exiftool('-j', '-n', '-G1', path))
    sizes = {'ExifIFD:ExifImageWidth': 50 * 32, 'ExifIFD:ExifImageHeight': 70 * 32}
    assert {key: found.get(key) for key in KEPT} == {**KEPT, **sizes}


class TestUnread:
    @pytest.mark.parametrize(
        'name, command',
        [
            ('a.heic', 'heif-convert a.heic a.png'),
            ('a b.heic', "heif-convert 'a b.heic' 'a b'.png"),
            ('a.HIF', 'heif-convert a.HIF a.png'),
            ('a.avif', 'avifdec a.avif a.png'),
            ('a.NEF', 'darktable-cli a.NEF a.tif'),
            ('a.cr3', 'darktable-cli a.cr3 a.tif'),
            ('a.dng', 'darktable-cli a.dng a.tif'),
            ('a.psd', 'magick a.psd[0] a.png'),
            ('a.jxl', 'djxl a.jxl a.png'),
        ],
    )
    @pytest.mark.parametrize('target', ['out', 'b.png'])
    def test_a_file_is_refused(self, tmp_path, monkeypatch, network, name, command, target):
        monkeypatch.chdir(tmp_path)
        Image.fromarray(COFFEE).save(name, 'TIFF')  # raw files look like TIFF, and are not to be taken for it
        with pytest.raises(DataError, match='-i: cannot read') as caught:
            upscale(network, name, target)
        assert str(caught.value) == f'-i: cannot read {name}; convert first, e.g. {command}.'
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_a_folder_names_them(self, tmp_path, monkeypatch, network, capsys):
        monkeypatch.chdir(tmp_path)
        Path('in').mkdir()
        Image.fromarray(COFFEE).save('in/z.png')
        for name in ('a.heic', 'b.heic', 'c.nef', 'd.heic'):
            Path('in', name).touch()
        written, _ = upscale(network, 'in', 'out')
        assert [path.name for path in written] == ['z.png']
        assert capsys.readouterr().err.splitlines()[0] == (
            'basicsr: warning: in: cannot read a.heic, b.heic, c.nef and 1 more; convert first, e.g. '
            'heif-convert a.heic a.png, darktable-cli c.nef c.tif.'
        )
        Path('in/z.png').unlink()
        with pytest.raises(DataError, match=r'-i: in contains no images \(.*\); cannot read a\.heic, b\.heic, c\.nef'):
            upscale(network, 'in', 'out')


class TestProfilesOfPairs:
    def save(self, path: Path, profile: bytes | None) -> Path:
        Image.fromarray(COFFEE).save(path, icc_profile=profile)
        return path

    @pytest.mark.parametrize(
        'first, second', [(SRGB, None), (display_p3(), display_p3('of another program')), (grey_profile(),) * 2]
    )
    def test_equivalent_profiles_are_accepted(self, tmp_path, first, second):
        paths = [self.save(tmp_path / name, icc) for name, icc in (('gt.png', first), ('lq.jpg', second))]
        assert require_same_profile(*paths) is None

    @pytest.mark.parametrize(
        'first, second, names',
        [
            (display_p3(), None, r'\(Display P3\) and .*lq\.png \(no profile, i.e. sRGB\)'),
            (SRGB, display_p3(), r'\(sRGB.*\) and .*lq\.png \(Display P3\)'),
            (grey_profile(), None, r'\(Gamma 1\.8\) and'),
            (b'damaged' * 30, None, r'\(a damaged profile\) and'),
        ],
    )
    def test_different_profiles_are_named(self, tmp_path, first, second, names):
        paths = [self.save(tmp_path / f'{name}.png', icc) for name, icc in (('gt', first), ('lq', second))]
        with pytest.raises(DataError, match=rf'gt\.png {names}.*have different colour profiles; convert both') as error:
            require_same_profile(*paths)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, dtype, deep', [('a.png', 'uint16', 1), ('a.tif', 'uint16', 1), ('a.png', 'uint8', 0)])
def test_16_bit_files_are_recognised(tmp_path, name, dtype, deep):
    cv2.imwrite(str(tmp_path / name), COFFEE.astype(dtype))
    assert has_16_bits(tmp_path / name) == bool(deep)
