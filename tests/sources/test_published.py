"""Recipes for published datasets, on made-up images in the published layouts."""

import shlex

import cv2
import numpy as np
import pytest
import torch
from basicsr.data.data_util import paths_from_lmdb
from torch.nn import functional as F

from drtl_plugin import cli
from drtl_plugin.data.image_files import image_names
from drtl_plugin.errors import DataError
from drtl_plugin.sources.published import prepare_pairs, prepare_subimages
from tests.conftest import OPTIONS
from tests.data.test_bad_files import damaged_png


def write(path, height, width, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
    return image


@pytest.fixture
def realsr(tmp_path):
    root = tmp_path / 'RealSR(V3)'
    for camera in ('Canon', 'Nikon'):
        for phase, num in (('Train', 2), ('Test', 1)):
            for i in range(1, num + 1):
                for scale in (2, 4):
                    folder = root / camera / phase / str(scale)
                    write(folder / f'{camera}_{i:03d}_HR.png', 40, 48)
                    write(folder / f'{camera}_{i:03d}_LR{scale}.png', 40 // scale, 48 // scale)
    return root


def test_realsr(realsr, tmp_path):
    target = tmp_path / 'out'
    assert prepare_pairs('realsr', realsr, target, 4, 'Canon') == {'support': 2, 'val': 1}
    assert image_names(target / 'support/gt', '') == image_names(target / 'support/lq', '')
    assert image_names(target / 'support/lq', '') == ['Canon_001.png', 'Canon_002.png']
    source = (realsr / 'Canon/Test/4/Canon_001_LR4.png').read_bytes()
    assert (target / 'val/lq/Canon_001.png').read_bytes() == source
    assert prepare_pairs('realsr', realsr.parent, tmp_path / 'both', 2) == {'support': 4, 'val': 2}


def test_drealsr(tmp_path):
    root = tmp_path / 'DRealSR/x4'
    for phase, names in (('train', ['panasonic_1', 'DSC_7']), ('test', ['sony_3', 'DSC_8'])):
        for name in names:
            write(root / f'{phase.title()}_x4/{phase}_HR/{name}_x4.png', 40, 48)
            write(root / f'{phase.title()}_x4/{phase}_LR/{name}_x1.png', 10, 12)
    assert prepare_pairs('drealsr', tmp_path / 'DRealSR', tmp_path / 'all', 4) == {'support': 2, 'val': 2}
    assert image_names(tmp_path / 'all/val/lq', '') == ['DSC_8.png', 'sony_3.png']
    assert prepare_pairs('drealsr', root, tmp_path / 'one', 4, 'DSC') == {'support': 1, 'val': 1}


def test_city100_is_cropped_and_reduced_by_antialiased_bicubic(tmp_path):
    root = tmp_path / 'City100'
    for i in (1, 4, 14, 31, 99):
        for kind in 'HL':
            image = write(root / f'City100_iPhoneX/{i:03d}{kind}.PNG', 50, 61, seed=i)
            if (i, kind) == (31, 'L'):
                enlarged = image
    target = tmp_path / 'out'
    assert prepare_pairs('city100', root, target, 2, 'iPhoneX') == {'support': 1, 'val': 2}
    assert cv2.imread(str(target / 'support/gt/031.png')).shape == (48, 60, 3)
    lq = cv2.imread(str(target / 'support/lq/031.png')).astype(float)
    tensor = torch.from_numpy(enlarged[:48, :60]).permute(2, 0, 1)[None].float()
    expected = F.interpolate(tensor, size=(24, 30), mode='bicubic', antialias=True)[0].permute(1, 2, 0).numpy()
    assert np.abs(lq - expected.clip(0, 255))[4:-4, 4:-4].max() <= 0.51


@pytest.mark.parametrize('kind', 'HL')
def test_damaged_photographs_are_named(tmp_path, capsys, kind):
    for name in ('004H', '004L', '031H', '031L'):
        write(tmp_path / f'City100_iPhoneX/{name}.PNG', 50, 61)
    damaged_png(tmp_path / f'City100_iPhoneX/031{kind}.PNG')
    path = str(tmp_path / 'City100_iPhoneX')
    assert cli.main(['prepare', 'city100', str(tmp_path), str(tmp_path / 'out'), '--camera', 'iPhoneX']) == 2
    assert f'basicsr: error: {path}/031{kind}.PNG: cannot be read as an image' in capsys.readouterr().err
    assert cli.main(['prepare', 'subimages', path, str(tmp_path / 'out'), '--size', '32']) == 2
    assert f'basicsr: error: {path}/031{kind}.PNG: cannot be read as an image' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_subimages_cover_every_pixel(tmp_path):
    image = write(tmp_path / 'hr/a.png', 50, 71)
    assert prepare_subimages([str(tmp_path / 'hr')], tmp_path / 'sub', size=32, step=16) == 3 * 4
    parts = [cv2.imread(str(tmp_path / 'sub' / name)) for name in image_names(tmp_path / 'sub', '')]
    assert all(part.shape == (32, 32, 3) for part in parts)
    corners = [(top, left) for top in (0, 16, 18) for left in (0, 16, 32, 39)]
    covered = np.zeros_like(image)
    for part, (top, left) in zip(parts, corners, strict=True):
        assert (part == image[top : top + 32, left : left + 32]).all()
        covered[top : top + 32, left : left + 32] = 1
    assert covered.all()


class TestWrongInput:
    def test_of_pairs(self, realsr, tmp_path):
        def message(**changes):
            arguments = {'dataset': 'realsr', 'source': realsr, 'target': tmp_path / 'x', 'scale': 4, **changes}
            with pytest.raises(DataError) as error:
                prepare_pairs(**arguments)
            assert not (tmp_path / 'x').exists()
            return str(error.value)

        assert '--scale 5' in message(scale=5)
        assert 'Canon, Nikon' in message(camera='canon')
        assert 'no realsr pairs of scale 3' in message(scale=3)
        assert 'there is no folder' in message(source=tmp_path / 'nowhere')
        assert 'already exists' in message(target=realsr)
        assert '--camera is missing' in message(dataset='city100')
        write(realsr / 'Canon/Train/4/Canon_002_LR4.png', 11, 12)
        assert '12x11, but Canon_002_HR.png is 48x40, not 4 times that' in message()
        (realsr / 'Canon/Train/4/Canon_002_LR4.png').unlink()
        assert 'its LQ image Canon_002_LR4.png is missing' in message()
        write(realsr / 'copy/Nikon/Test/2/Nikon_001_HR.png', 40, 48)
        write(realsr / 'copy/Nikon/Test/2/Nikon_001_LR2.png', 20, 24)
        assert 'pairs with the same name' in message(scale=2)

    def test_of_subimages(self, tmp_path):
        write(tmp_path / 'a/x.png', 40, 48)
        write(tmp_path / 'b/x.png', 40, 48)
        folders = [str(tmp_path / name) for name in 'ab']
        with pytest.raises(DataError, match='has the same name; rename'):
            prepare_subimages(folders, tmp_path / 'sub', 32, 16)
        with pytest.raises(DataError, match='48x40 is smaller than sub-images of 64'):
            prepare_subimages(folders[:1], tmp_path / 'sub', 64, 16)
        assert not (tmp_path / 'sub').exists()


class TestCommand:
    def test_pairs_as_lmdb(self, realsr, tmp_path, capsys):
        target = tmp_path / 'nikon'
        arguments = ['prepare', 'realsr', str(realsr), str(target), '--camera', 'Nikon', '--lmdb']
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out.endswith(f'2 pairs to adapt to and 1 held out are in {target}.\n')
        assert sorted(paths_from_lmdb(str(target / 'support/gt.lmdb'))) == ['Nikon_001', 'Nikon_002']
        assert {path.name for path in (target / 'val').iterdir()} == {'gt.lmdb', 'lq.lmdb'}
        assert cli.main(arguments) == 2
        assert 'already exists' in capsys.readouterr().err

    def test_subimages_as_folder_and_lmdb(self, tmp_path, capsys):
        write(tmp_path / 'hr/a.png', 48, 64)
        arguments = ['prepare', 'subimages', str(tmp_path / 'hr')]
        assert cli.main([*arguments, str(tmp_path / 'sub'), '--size', '32', '--step', '16']) == 0
        assert capsys.readouterr().out == f'6 sub-images are in {tmp_path / "sub"}.\n'
        assert cli.main([*arguments, str(tmp_path / 'sub.lmdb'), '--size', '48', '--step', '16', '--lmdb']) == 2
        assert 'already exists' in capsys.readouterr().err  # the folder of that name is not overwritten
        assert cli.main([*arguments, str(tmp_path / 'b.lmdb'), '--size', '48', '--step', '16', '--lmdb']) == 0
        assert sorted(paths_from_lmdb(str(tmp_path / 'b.lmdb'))) == ['a_s001', 'a_s002']
        assert cli.main([*arguments, str(tmp_path / 'c'), '--lmdb']) == 2
        assert 'must end in .lmdb' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['drtl_x4_realsr', 'drtl_x4_city100'])
def test_option_files_run_after_the_commands_in_their_heads(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ('DIV2K_train_HR', 'Flickr2K_HR'):
        write(tmp_path / folder / f'{folder}.png', 480, 500)
    for phase in ('Train', 'Test'):
        for i in range(1, 6):
            write(tmp_path / f'RealSR(V3)/Canon/{phase}/4/Canon_{i:03d}_HR.png', 96, 96, i)
            write(tmp_path / f'RealSR(V3)/Canon/{phase}/4/Canon_{i:03d}_LR4.png', 24, 24, i)
    for i in (4, 11, 14, 31, 51, 71, 91):
        for kind in 'HL':
            write(tmp_path / f'City100/City100_NikonD5500/{i:03d}{kind}.PNG', 97, 100, i)
    path = OPTIONS / f'{name}.yml'
    commands = [line[4:] for line in path.read_text().splitlines() if line.startswith('#   basicsr ')]
    assert len(commands) == 2
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0
    changes = ['train:total_iter=2', 'datasets:train:gt_size=64', 'datasets:train:num_worker_per_gpu=0']
    changes += ['network_g:num_feat=8', 'network_g:num_block=1', 'drtl:camera_fit=false', 'drtl:adapt:steps=1']
    changes += ['drtl:weighting:relation=uniform', 'logger:use_tb_logger=false', 'val:val_freq=2']
    assert cli.main(['train', '-opt', str(path), '--force_yml', *changes]) == 0
    assert 'after adaptation' in capsys.readouterr().out
    assert (tmp_path / f'experiments/{name}/models/net_g_adapted_latest.pth').is_file()
