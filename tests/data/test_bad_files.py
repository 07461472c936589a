"""Images and LMDBs of all kinds, good and bad, as they lie in people's folders."""

import io
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from basicsr.utils import FileClient, imfrombytes
from PIL import Image, ImageFile

from drtl_plugin import cli
from drtl_plugin.data.distortion_task_dataset import DistortionTaskDataset
from drtl_plugin.data.image_files import check_paired_keys, image_size, is_turned, names_of_list, read_image
from drtl_plugin.errors import DataError
from drtl_plugin.sources.sample import SAMPLE_ROOT

PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (32, 40, 3)).astype(np.uint8)
PHOTOGRAPH = cv2.resize(PHOTOGRAPH, (120, 96), interpolation=cv2.INTER_CUBIC)


def encoded(kind: str) -> bytes:
    """The photograph in a file of another kind; written by Pillow where it can."""
    image, buffer = Image.fromarray(PHOTOGRAPH), io.BytesIO()
    if kind == '16 bits':
        return cv2.imencode('.png', PHOTOGRAPH[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    if kind == 'grey':
        image.convert('L').save(buffer, 'PNG')
    elif kind == 'alpha':
        image.putalpha(128)
        image.save(buffer, 'PNG')
    elif kind == 'palette':
        image.convert('P').save(buffer, 'PNG')
    elif kind in ('JPEG', 'CMYK'):
        image.convert('RGB' if kind == 'JPEG' else 'CMYK').save(buffer, 'JPEG', quality=98, subsampling=0)
    elif kind == 'with a trailer':  # as telephones write behind the end of the image
        image.save(buffer, 'JPEG', quality=98, subsampling=0)
        buffer.write(b'of the maker' * 10)
    else:
        image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    'kind', ['16 bits', 'grey', 'alpha', 'palette', 'JPEG', 'CMYK', 'with a trailer', 'BMP', 'TIFF']
)
def test_images_of_all_kinds_are_rgb_of_8_bits(tmp_path, generator, kind):
    suffix = {'BMP': 'bmp', 'TIFF': 'tif', 'JPEG': 'jpg', 'CMYK': 'jpg', 'with a trailer': 'jpg'}.get(kind, 'png')
    content = encoded(kind)
    (tmp_path / f'a photograph, größer.{suffix}').write_bytes(content)
    opt = {'name': 'x', 'type': 'DistortionTaskDataset', 'dataroot_gt': str(tmp_path), 'gt_size': 96, 'scale': 4}
    dataset = DistortionTaskDataset({**opt, 'use_hflip': False, 'use_rot': False})
    dataset.check_image_sizes()
    patch = dataset.gt_patches(1, generator)[0].permute(1, 2, 0).numpy() * 255
    expected = np.asarray(Image.fromarray(PHOTOGRAPH).convert('L').convert('RGB') if kind == 'grey' else PHOTOGRAPH)
    if kind == 'palette':
        expected = np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))
    error = min(np.abs(patch - expected[:, left : left + 96]).mean() for left in range(25))
    assert error < (3 if suffix == 'jpg' else 0.01)


@pytest.mark.parametrize('orientation', [1, 6])
@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'TIFF'])
def test_sizes_are_those_that_training_sees(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f'a.{kind.lower()}'
    Image.fromarray(PHOTOGRAPH).save(path, kind, exif=exif)
    assert image_size(str(path)) == imfrombytes(path.read_bytes()).shape[:2]
    assert is_turned(str(path)) == (orientation > 1)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


@pytest.mark.parametrize(
    'chunk',
    [
        png_chunk(b'eXIf', b'no header'),
        png_chunk(b'zTXt', b'Comment\0\0' + zlib.compress(bytes(2**21))),
        png_chunk(b'tEXt', b'Comment\0text')[:-1] + b'?',
    ],
)
def test_pngs_with_headers_that_pillow_refuses(tmp_path, chunk):
    content = encoded('PNG')
    (tmp_path / 'a.png').write_bytes(content[:33] + chunk + content[33:])
    assert image_size(str(tmp_path / 'a.png')) == (96, 120)
    assert not is_turned(str(tmp_path / 'a.png'))


def test_jpegs_with_an_orientation_that_is_none(tmp_path):
    text = struct.pack('<2sHIHHHI4sI', b'II', 42, 8, 1, 0x0112, 2, 3, b'up', 0)  # where a number should be
    Image.fromarray(PHOTOGRAPH).save(tmp_path / 'a.jpg', 'JPEG', exif=b'Exif\0\0' + text)
    assert image_size(str(tmp_path / 'a.jpg')) == (96, 120)
    assert not is_turned(str(tmp_path / 'a.jpg'))


def test_large_images_are_no_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    (tmp_path / 'a.png').write_bytes(encoded('PNG'))
    assert image_size(str(tmp_path / 'a.png')) == (96, 120)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_large_jpegs_with_a_trailer_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    content = encoded('with a trailer')
    (tmp_path / 'a.jpg').write_bytes(content)
    wanted = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(read_image(tmp_path / 'a.jpg'), wanted)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_jpegs_with_a_trailer_are_decoded_once(tmp_path, monkeypatch):
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda image: decoded.append(image) or load(image))
    (tmp_path / 'a.jpg').write_bytes(encoded('with a trailer'))
    assert read_image(tmp_path / 'a.jpg').shape == (96, 120, 3)  # by OpenCV
    assert not decoded


@pytest.mark.parametrize('progressive', [False, True])
def test_cut_jpegs_with_a_thumbnail_are_named(tmp_path, progressive):
    """The thumbnail has an end mark of its own."""
    thumbnail, buffer = io.BytesIO(), io.BytesIO()
    Image.fromarray(PHOTOGRAPH[:16, :16]).save(thumbnail, 'JPEG')
    exif = b'Exif\0\0II*\0\x08\0\0\0' + bytes(6) + thumbnail.getvalue()
    Image.fromarray(PHOTOGRAPH).save(buffer, 'JPEG', exif=exif, progressive=progressive)
    assert buffer.getvalue().count(b'\xff\xd9') == 2
    (tmp_path / 'a.jpg').write_bytes(buffer.getvalue())
    assert read_image(tmp_path / 'a.jpg').shape == (96, 120, 3)
    (tmp_path / 'a.jpg').write_bytes(buffer.getvalue()[:-500])
    with pytest.raises(DataError, match=r'a\.jpg: cannot be read as an image'):
        read_image(tmp_path / 'a.jpg')


@pytest.mark.parametrize('cut', [1, 4, 12, 13, 21, 100])
@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'TIFF'])
def test_the_last_bytes_count(tmp_path, kind, cut):
    content = encoded(kind)[:-cut]
    path = tmp_path / f'a.{kind.lower()}'
    path.write_bytes(content)
    try:
        readable = imfrombytes(content) is not None
    except cv2.error:
        readable = False
    if readable:
        assert image_size(str(path)) == (96, 120)
    else:
        with pytest.raises(DataError, match='cannot be read as an image'):
            image_size(str(path))


def test_alpha_is_told_of_once(tmp_path, capsys):
    for name in 'ab':
        (tmp_path / f'{name}.png').write_bytes(encoded('alpha'))
        assert image_size(str(tmp_path / f'{name}.png')) == (96, 120)
    assert (
        capsys.readouterr().err == f'basicsr: warning: {tmp_path} has images with an alpha channel, which is dropped.\n'
    )


BAD = {
    'cut.png': lambda: encoded('PNG')[:-500],
    'cut.jpg': lambda: encoded('JPEG')[:-500],
    'empty.png': lambda: b'',
    'text.png': lambda: b'not an image',
    'small.png': lambda: cv2.imencode('.png', PHOTOGRAPH[:20, :20])[1].tobytes(),
}


@pytest.mark.parametrize('name', BAD)
@pytest.mark.parametrize('place', ['auxiliary', 'target', 'val'])
def test_bad_images_are_named_before_training(workdir, quick_opt, write_opt, capsys, name, place):
    datasets = quick_opt['datasets']
    if place == 'auxiliary':
        shutil.copytree(workdir / SAMPLE_ROOT / 'auxiliary', workdir / 'bad')
        datasets['train']['dataroot_gt'] = 'bad'
        path = workdir / 'bad' / name
    else:
        section = datasets['train']['target'] if place == 'target' else datasets['val']
        camera = workdir / SAMPLE_ROOT / 'camera' / {'target': 'support', 'val': 'val'}[place]
        shutil.copytree(camera, workdir / 'bad')
        section.update(dataroot_gt='bad/gt', dataroot_lq='bad/lq')
        first = sorted((workdir / 'bad/lq').iterdir())[0].name
        path = workdir / 'bad/lq' / Path(first).with_suffix(Path(name).suffix)
        if path.suffix != '.png':  # both of a pair have the same name
            (workdir / 'bad/lq' / first).unlink()
            other = workdir / 'bad/gt' / first
            cv2.imwrite(str(other.with_suffix(path.suffix)), cv2.imread(str(other)))
            other.unlink()
    path.write_bytes(BAD[name]())
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('basicsr: error:')]
    assert len(lines) == 1
    assert str(path.relative_to(workdir)) in lines[0]
    assert not (workdir / 'experiments').exists()


def damaged_png(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[60:70] = b'0123456789'
    path.write_bytes(content)


def test_photographs_without_ground_truth_are_named(workdir, quick_opt, write_opt, capsys):
    shutil.copytree(workdir / SAMPLE_ROOT / 'camera/val/lq', workdir / 'bad')
    opt = {key: quick_opt[key] for key in ('scale', 'num_gpu', 'network_g', 'model_type')}
    photographs = {'name': 'p', 'type': 'SingleImageDataset', 'dataroot_lq': 'bad', 'io_backend': {'type': 'disk'}}
    opt.update(name='t', datasets={'test_1': photographs}, path={}, val={'save_img': False})
    damaged_png(workdir / 'bad/coffee.png')
    assert cli.main(['test', '-opt', write_opt(opt)]) == 2
    assert 'basicsr: error: bad/coffee.png of bad: cannot be read as an image.\n' in capsys.readouterr().err
    (workdir / 'bad/coffee.png').write_bytes(b'')
    assert cli.main(['test', '-opt', write_opt(opt)]) == 2
    assert 'basicsr: error: bad/coffee.png: cannot be read as an image' in capsys.readouterr().err
    for path in (workdir / 'bad').iterdir():
        path.unlink()
    assert cli.main(['test', '-opt', write_opt(opt)]) == 2
    assert 'bad contains no images' in capsys.readouterr().err


def test_lmdbs_are_not_made_of_damaged_images(workdir, capsys):
    shutil.copytree(workdir / SAMPLE_ROOT / 'camera/val/lq', workdir / 'bad')
    damaged_png(workdir / 'bad/coffee.png')
    assert cli.main(['lmdb', 'bad', 'x.lmdb']) == 2
    assert 'basicsr: error: bad/coffee.png: cannot be read as an image' in capsys.readouterr().err
    assert not (workdir / 'x.lmdb').exists()


def test_images_that_go_bad_later_are_named(workdir, quick_opt, write_opt, capsys, monkeypatch):
    """Damage that no header shows: a byte in the middle, found when the image is read."""
    shutil.copytree(workdir / SAMPLE_ROOT / 'camera/val', workdir / 'bad')
    damaged_png(workdir / 'bad/lq/coffee.png')
    quick_opt['datasets']['val'].update(dataroot_gt='bad/gt', dataroot_lq='bad/lq')
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
    assert 'basicsr: error: bad/lq/coffee.png of bad/lq: cannot be read as an image.\n' in capsys.readouterr().err


def test_mixed_folders_train(workdir, quick_opt, write_opt):
    (workdir / 'mixed').mkdir()
    for i, kind in enumerate(('16 bits', 'grey', 'alpha', 'CMYK')):
        (workdir / f'mixed/übung {i}.{"jpg" if kind == "CMYK" else "png"}').write_bytes(encoded(kind))
    (workdir / 'mixed/notes.txt').write_text('where they were taken')
    quick_opt['datasets']['train']['dataroot_gt'] = 'mixed'
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda bad: shutil.rmtree(bad / 'lq') or (bad / 'lq').mkdir(), 'different number of images: 0, 3'),
        (lambda bad: [shutil.rmtree(bad / k) or (bad / k).mkdir() for k in ('lq', 'gt')], 'bad/lq contains no images'),
        (lambda bad: (bad / 'lq/coffee.png').rename(bad / 'lq/tea.png'), 'coffee.png is not in lq_paths'),
        (lambda bad: (bad / 'lq/notes.txt').touch(), 'different number of images'),
        (lambda bad: [(bad / k / 'notes.txt').touch() for k in ('lq', 'gt')], 'notes.txt: cannot be read as an image'),
    ],
)
def test_folders_of_pairs_that_do_not_match(workdir, quick_opt, write_opt, capsys, change, message):
    shutil.copytree(workdir / SAMPLE_ROOT / 'camera/val', workdir / 'bad')
    change(workdir / 'bad')
    quick_opt['datasets']['val'].update(dataroot_gt='bad/gt', dataroot_lq='bad/lq')
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
    assert message in capsys.readouterr().err


def test_lists_of_images_may_hold_spaces_and_sizes(tmp_path):
    lines = ['a b.png (480,480,3)', 'c.png', '', 'sub folder/ü.jpg (1,2,3) 1', 'd.png, more']
    (tmp_path / 'list.txt').write_text('\n'.join(lines), encoding='utf-8')
    assert names_of_list(str(tmp_path / 'list.txt'), 'key') == ['a b.png', 'c.png', 'sub folder/ü.jpg', 'd.png']
    with pytest.raises(DataError, match=r'key: .*missing\.txt cannot be read'):
        names_of_list(str(tmp_path / 'missing.txt'), 'key')


class TestLmdb:
    @pytest.fixture
    def lmdb_opt(self, workdir, quick_opt) -> dict:
        assert cli.main(['lmdb', f'{SAMPLE_ROOT}/auxiliary', 'bad.lmdb']) == 0
        quick_opt['datasets']['train'].update(dataroot_gt='bad.lmdb', io_backend={'type': 'lmdb'})
        return quick_opt

    @pytest.mark.parametrize(
        ('damage', 'message'),
        [
            (
                lambda p: (p / 'data.mdb').write_bytes((p / 'data.mdb').read_bytes()[:-100_000]),
                'bad.lmdb/data.mdb is truncated',
            ),
            (lambda p: (p / 'data.mdb').write_bytes(b'foreign' * 9999), 'bad.lmdb is not an LMDB, or is damaged'),
            (lambda p: (p / 'data.mdb').write_bytes(b''), 'bad.lmdb is not an LMDB, or is damaged'),
            (lambda p: (p / 'data.mdb').unlink(), 'bad.lmdb is not an LMDB, or is damaged'),
            (lambda p: (p / 'meta_info.txt').unlink(), 'bad.lmdb is not an LMDB in the BasicSR layout'),
            (
                lambda p: (p / 'meta_info.txt').write_text('elsewhere.png (512,512,3) 1\n'),
                "bad.lmdb has no image 'elsewhere', listed in line 1 of its meta_info.txt",
            ),
            (lambda p: (p / 'meta_info.txt').write_text('../../x.png (512,512,3) 1\n'), "bad.lmdb has no image ''"),
            (lambda p: (p / 'meta_info.txt').write_text('\n'), "bad.lmdb has no image ''"),
        ],
    )
    def test_damaged_or_foreign_ones_are_named(self, workdir, lmdb_opt, write_opt, capsys, damage, message):
        damage(workdir / 'bad.lmdb')
        assert cli.main(['train', '-opt', write_opt(lmdb_opt)]) == 2
        error = capsys.readouterr().err
        assert f'basicsr: error: datasets.train.dataroot_gt: {message}' in error
        assert not (workdir / 'experiments').exists()

    def test_overwrite_replaces_an_lmdb_and_nothing_else(self, workdir, capsys):
        (workdir / 'images').mkdir()
        cv2.imwrite(str(workdir / 'images/a.png'), PHOTOGRAPH)
        assert cli.main(['lmdb', 'images', 'x.lmdb']) == 0
        cv2.imwrite(str(workdir / 'images/b.png'), PHOTOGRAPH)
        assert cli.main(['lmdb', 'images', 'x.lmdb']) == 2
        assert 'x.lmdb exists; use --overwrite or choose another name' in capsys.readouterr().err
        assert cli.main(['lmdb', 'images', 'x.lmdb', '--overwrite']) == 0
        assert len((workdir / 'x.lmdb/meta_info.txt').read_text().splitlines()) == 2
        assert FileClient('lmdb', db_paths='x.lmdb', client_keys='gt').get('b', 'gt')
        (workdir / 'other.lmdb').mkdir()
        (workdir / 'other.lmdb/mine.txt').touch()
        assert cli.main(['lmdb', 'images', 'other.lmdb', '--overwrite']) == 2
        assert 'other.lmdb is not an LMDB; remove it or choose another name' in capsys.readouterr().err
        assert (workdir / 'other.lmdb/mine.txt').is_file()
        assert sorted(path.name for path in workdir.iterdir() if path.name.startswith('.')) == []


class TestKeysOfPairs:
    """LMDBs whose keys differ, in all places where pairs are read."""

    @pytest.fixture(params=['train.target', 'val', 'train', 'test_1'])
    def refusal(self, workdir, quick_opt, write_opt, capsys, request):
        """The one line by which ``gt.lmdb`` and ``lq.lmdb`` are refused."""

        def refuse() -> str:
            lmdbs = {'dataroot_gt': 'gt.lmdb', 'dataroot_lq': 'lq.lmdb', 'io_backend': {'type': 'lmdb'}}
            command, datasets = 'train', quick_opt['datasets']
            if request.param == 'train.target':
                datasets['train']['target'].update(lmdbs)
            elif request.param == 'val':
                datasets['val'].update(lmdbs)
            elif request.param == 'train':
                quick_opt['model_type'] = 'SRModel'
                datasets['train'] = {'name': 'p', 'type': 'PairedImageDataset', 'batch_size_per_gpu': 1, **lmdbs}
                datasets['train']['num_worker_per_gpu'] = 0
            else:
                command, quick_opt['datasets'] = 'test', {'test_1': {**datasets['val'], **lmdbs}}
            assert cli.main([command, '-opt', write_opt(quick_opt)]) == 2
            (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith('basicsr: error: '))
            assert f'datasets.{request.param}: ' in line
            return line

        return refuse

    @pytest.fixture(autouse=True)
    def folders(self, workdir):
        for side in ('gt', 'lq'):
            shutil.copytree(workdir / SAMPLE_ROOT / 'camera/val' / side, workdir / side)
        assert cli.main(['lmdb', 'gt', 'gt.lmdb']) == 0

    def test_an_ending_is_named(self, workdir, refusal):
        for path in list((workdir / 'lq').iterdir()):
            path.rename(path.with_stem(f'{path.stem}x4'))
        assert cli.main(['lmdb', 'lq', 'lq.lmdb']) == 0
        line = refusal()
        assert "keys of lq.lmdb end in 'x4', those of gt.lmdb do not ('camerax4', 'camera')" in line
        command = line.partition(' with basicsr ')[2].rstrip('.')
        assert cli.main(command.replace('FOLDER', 'lq').split()) == 0
        check_paired_keys('lq.lmdb', 'gt.lmdb', 'key')

    def test_keys_are_named(self, workdir, refusal):
        (workdir / 'lq/coffee.png').rename(workdir / 'lq/tea.png')
        assert cli.main(['lmdb', 'lq', 'lq.lmdb']) == 0
        assert (
            "lq.lmdb contains 'tea', which gt.lmdb lacks, and gt.lmdb contains 'coffee', which lq.lmdb lacks"
            in refusal()
        )

    def test_a_missing_key_is_named(self, workdir, refusal):
        (workdir / 'lq/coffee.png').unlink()
        assert cli.main(['lmdb', 'lq', 'lq.lmdb']) == 0
        line = refusal()
        assert ": gt.lmdb contains 'coffee', which lq.lmdb lacks; " in line


def test_names_of_images_do_not_lead_out_of_the_results(workdir, quick_opt, write_opt):
    """Keys of an LMDB are whatever its author wrote."""
    from basicsr.utils.lmdb_util import make_lmdb_from_imgs

    for part in ('gt', 'lq'):
        source = workdir / SAMPLE_ROOT / 'camera/val' / part
        make_lmdb_from_imgs(str(source), f'{part}.lmdb', ['coffee.png'], ['/tmp/evil/x'])
    val = {**quick_opt['datasets']['val'], 'io_backend': {'type': 'lmdb'}}
    val.update(dataroot_gt='gt.lmdb', dataroot_lq='lq.lmdb')
    opt = {key: quick_opt[key] for key in ('scale', 'num_gpu', 'network_g', 'model_type')}
    opt.update(name='t', datasets={'test_1': val}, path={}, val={'save_img': True, 'suffix': None})
    before = set(workdir.rglob('*'))
    assert cli.main(['test', '-opt', write_opt(opt)]) == 0
    written = set(workdir.rglob('*.png')) - before
    assert [path.relative_to(workdir).as_posix() for path in written] == [
        'results/t/visualization/sample_camera/x_t.png'
    ]
    assert not Path('/tmp/evil').exists()
