"""What happens where the options or the data are wrong."""

import argparse
import copy
import logging
import math
import re
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, METRIC_REGISTRY

from drtl_plugin import cli, preflight
from drtl_plugin.data.distortion_task_dataset import DistortionTaskDataset
from drtl_plugin.errors import OptionError
from drtl_plugin.options.parse import parse_options
from drtl_plugin.sources.sample import SAMPLE_ROOT
from tests.conftest import OPTIONS


def arguments(path: str) -> argparse.Namespace:
    return argparse.Namespace(opt=path, launcher='none', auto_resume=False, debug=False, force_yml=None)


@pytest.mark.parametrize('text', ['x: &a {b: *a}', 'x: ' + '[' * 5000, 'x: &a [*a, *a, *a, *a]'])
def test_files_that_hold_themselves_or_go_too_deep(tmp_path, capsys, text):
    (tmp_path / 'deep.yml').write_text(text)
    assert cli.main(['train', '-opt', str(tmp_path / 'deep.yml')]) == 2
    error = capsys.readouterr().err
    assert 'deep.yml' in error
    assert error.count('\n') == 1


def test_keys_that_are_not_in_the_file_can_be_forced(workdir, quick_opt, write_opt, capsys):
    path = write_opt(quick_opt)
    assert cli.main(['train', '-opt', path, '--force_yml', 'path:pretrain_network_r=none']) == 0
    assert cli.main(['train', '-opt', path, '--force_yml', 'train:totaliter=2']) == 2
    assert "train: unknown key 'totaliter'; did you mean 'total_iter'?" in capsys.readouterr().err


def test_metrics_of_ones_own_take_what_they_read(workdir, quick_opt, write_opt, monkeypatch):
    monkeypatch.setattr(METRIC_REGISTRY, '_obj_map', dict(METRIC_REGISTRY._obj_map))

    @METRIC_REGISTRY.register()
    def half(img, img2, *, crop_border, **kwargs):
        return crop_border / kwargs['by']

    quick_opt['val']['metrics'] = {'half': {'type': 'half', 'crop_border': 4, 'by': 2}}
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0


def test_without_wandb_a_line_says_so(workdir, quick_opt, write_opt, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    quick_opt['logger'].update(use_tb_logger=True, wandb={'project': 'x'})
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
    assert 'logger.wandb: wandb is missing; pip install wandb' in capsys.readouterr().err


class TestDatasets:
    @pytest.fixture
    def built(self, monkeypatch) -> list[str]:
        """The names of all paired datasets that are built."""
        names = []
        build = PairedImageDataset.__init__

        def build_and_note(dataset, opt):
            names.append(opt['name'])
            build(dataset, opt)

        monkeypatch.setattr(PairedImageDataset, '__init__', build_and_note)
        return names

    @pytest.fixture
    def plain_opt(self, workdir, quick_opt) -> dict:
        pairs = {
            'type': 'PairedImageDataset',
            **quick_opt['datasets']['train']['target'],
            'io_backend': {'type': 'disk'},
        }
        del pairs['num_shot']
        loader = {'gt_size': 64, 'use_hflip': True, 'use_rot': True, 'batch_size_per_gpu': 2, 'num_worker_per_gpu': 0}
        quick_opt.update(model_type='SRModel', datasets={'train': {**pairs, 'name': 'a', **loader}})
        quick_opt['datasets'].update(val={**pairs, 'name': 'b'}, val_2={**pairs, 'name': 'c'})
        return {key: value for key, value in quick_opt.items() if key not in ('drtl', 'network_r')}

    def test_each_is_built_once_and_returned_by_phase(self, plain_opt, workdir, write_opt, built):
        opt = parse_options(arguments(write_opt(plain_opt)), str(workdir), is_train=True)
        before = copy.deepcopy(opt)
        datasets = preflight.check(opt)
        assert {phase: dataset.opt['name'] for phase, dataset in datasets.items()} == {
            **{'train': 'a', 'val': 'b', 'val_2': 'c'}
        }
        assert built == ['a', 'b', 'c']
        assert datasets['train'][0]['gt'].shape == (3, 64, 64)
        assert opt == before

    def test_types_of_ones_own_are_built_too(self, plain_opt, workdir, write_opt, monkeypatch):
        class OwnDataset(torch.utils.data.Dataset):
            def __init__(self, opt):
                self.numbers = range(opt['largest'])

        monkeypatch.setattr(DATASET_REGISTRY, '_obj_map', {**DATASET_REGISTRY._obj_map, 'OwnDataset': OwnDataset})
        plain_opt['datasets']['val'] = {'name': 'own', 'type': 'OwnDataset', 'largest': 3}
        opt = parse_options(arguments(write_opt(plain_opt)), str(workdir), is_train=True)
        assert preflight.check(opt)['val'].numbers == range(3)
        del opt['datasets']['val']['largest']
        with pytest.raises(OptionError, match=r'datasets\.val: OwnDataset cannot be built: KeyError: .largest'):
            preflight.check(opt)


class TestNetworksOfOnesOwn:
    NETWORK = """import logging
import PIL.Image
import torch
from basicsr.utils.registry import ARCH_REGISTRY


@ARCH_REGISTRY.register()
class OwnNet(torch.nn.Module):
    def __init__(self, fault=None):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 48, 3, padding=1)
        self.fault = fault
        logging.getLogger('own').warning('building')

    def forward(self, x):
        if self.fault == 'key':
            return {}['nothing']
        if self.fault == 'number':
            return 1 / 0
        if self.fault == 'shape':
            return torch.nn.functional.pixel_shuffle(self.conv(x), 5)
        if self.fault == 'library':
            return PIL.Image.new('none', (8, 8))
        return torch.nn.functional.pixel_shuffle(self.conv(x), 4)
"""

    @pytest.fixture
    def own_opt(self, workdir, quick_opt, monkeypatch) -> dict:
        monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', dict(ARCH_REGISTRY._obj_map))
        monkeypatch.delitem(sys.modules, 'own_net', raising=False)
        (workdir / 'own_net.py').write_text(self.NETWORK)
        quick_opt['network_g'] = {'type': 'OwnNet'}
        return quick_opt

    @pytest.mark.parametrize(
        ('fault', 'message', 'line'),
        [
            ('key', "KeyError: 'nothing'", 17),
            ('number', 'ZeroDivisionError: division by zero', 19),
            ('shape', 'RuntimeError: pixel_shuffle expects', 21),
            ('library', 'ValueError: unrecognized image mode', 23),
        ],
    )
    @pytest.mark.parametrize('debug', [False, True])
    def test_errors_are_named_with_type_and_line(
        self, workdir, own_opt, write_opt, capsys, fault, message, line, debug
    ):
        own_opt['network_g']['fault'] = fault
        command = ['train', '-opt', write_opt(own_opt), '--import', 'own_net', *['--debug'] * debug]
        assert cli.main(command) == 2
        *others, last = [text for text in capsys.readouterr().err.splitlines() if text != 'building']
        assert last.startswith(f'basicsr: error: DRTLModel cannot be built: {message}')
        assert last.endswith(f' ({workdir}/own_net.py:{line})')
        assert not (workdir / 'experiments').exists()
        if debug:
            assert f'  File "{workdir}/own_net.py", line {line}, in forward' in others
        else:
            assert not others

    def test_their_logs_are_left_alone(self, own_opt, write_opt, caplog):
        """Preflight silences BasicSR's logger only, and as long as it lasts."""
        own_opt['network_g']['fault'] = 'number'
        logging.disable(logging.INFO)
        try:
            assert cli.main(['train', '-opt', write_opt(own_opt), '--import', 'own_net']) == 2
            assert logging.root.manager.disable == logging.INFO
        finally:
            logging.disable(logging.NOTSET)
        assert [record.message for record in caplog.records if record.name == 'own'] == ['building'] * 2


class TestManyAuxiliaryImages:
    @pytest.fixture
    def many_opt(self, workdir, quick_opt, monkeypatch) -> dict:
        """Of 200 images, those that are not the first."""
        (workdir / 'many').mkdir()
        image = workdir / SAMPLE_ROOT / 'auxiliary/brick.png'
        for i in range(200):
            (workdir / f'many/{i:03}.png').symlink_to(image)
        quick_opt['datasets']['train']['dataroot_gt'] = 'many'
        return quick_opt

    def test_only_those_that_are_drawn_are_opened(self, many_opt, write_opt, monkeypatch):
        many_opt['datasets']['train'].update(num_episodes=8)
        opened, drawn = set(), set()
        watching = True

        def watch(event, arguments):
            if watching and event == 'open' and str(arguments[0]).startswith('many'):
                opened.add(arguments[0])

        sys.addaudithook(watch)  # for the rest of this process
        read = DistortionTaskDataset._read_image
        monkeypatch.setattr(
            DistortionTaskDataset, '_read_image', lambda self, index: drawn.add(self.keys[index]) or read(self, index)
        )
        try:
            assert cli.main(['train', '-opt', write_opt(many_opt)]) == 0
        finally:
            watching = False
        assert opened == drawn
        assert 0 < len(opened) < 200

    def test_one_of_them_tells_that_patches_are_too_large(self, many_opt, workdir, write_opt, capsys):
        many_opt['datasets']['train']['gt_size'] = 1024
        assert cli.main(['train', '-opt', write_opt(many_opt)]) == 2
        assert 'is smaller than gt_size 1024' in capsys.readouterr().err
        assert not (workdir / 'experiments').exists()

    @pytest.mark.parametrize(
        ('content', 'message'),
        [
            (b'', '.png of many: cannot be read as an image.'),
            ('small', '.png: 20x20 is smaller than gt_size 64; remove it, or lower datasets.train.gt_size.'),
            ('cut', '.jpg of many: cannot be read as an image.'),
            (None, '.png: cannot be read (No such file or directory).'),
        ],
    )
    @pytest.mark.parametrize('workers', [0, 1])
    def test_a_bad_one_is_named_when_it_is_drawn(self, workdir, many_opt, write_opt, capsys, content, message, workers):
        names = [f'{i:03}.png' for i in range(64)]
        for i in range(64, 200):
            path = workdir / f'many/{i:03}.png'
            image = cv2.imread(str(path))
            path.unlink()
            if content == 'cut':
                path = path.with_suffix('.jpg')
                path.write_bytes(cv2.imencode('.jpg', image)[1].tobytes()[:-1000])
            elif content == 'small':
                cv2.imwrite(str(path), image[:20, :20])
            elif content is not None:
                path.write_bytes(content)
            names.append(path.name)
        (workdir / 'list.txt').write_text('\n'.join(names))
        many_opt['datasets']['train'].update(num_worker_per_gpu=workers, meta_info_file='list.txt')
        assert cli.main(['train', '-opt', write_opt(many_opt)]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(rf'basicsr: error: many/\d\d\d{re.escape(message)}', last)


class TestWrongInput:
    """One line that says what, where and what to do; exit code 2; the older experiment is left as it is."""

    CASES = [
        (['datasets', 'train', 'dataroot_gt'], 'nowhere', 'datasets.train.dataroot_gt: there is no folder nowhere'),
        (['datasets', 'val', 'dataroot_lq'], 'nowhere', 'datasets.val.dataroot_lq: there is no folder nowhere'),
        (['datasets', 'train', 'target', 'dataroot_lq'], 'nowhere', 'dataroot_lq: there is no folder nowhere'),
        (['scale'], 2, "don't fit scale 2"),
        (['datasets', 'train', 'gt_size'], 256, 'is smaller than gt_size 256'),
        (['datasets', 'train', 'target', 'num_shot'], 6, 'num_shot is 6, but there are 5 pairs'),
        (['datasets', 'train', 'distortions'], [{'name': 'gausian_blur'}], "did you mean 'gaussian_blur'?"),
        (['drtl', 'pipelines'], 'meta', "drtl: unknown key 'pipelines'; did you mean 'pipeline'?"),
        (['drtl', 'adapt', 'step'], 5, "drtl.adapt: unknown key 'step'; did you mean 'steps'?"),
        (['drtl', 'hooks'], [{'type': 'RelatonHook'}], "did you mean 'RelationHook'?"),
        (['network_g', 'type'], 'EDSRR', "network_g.type: unknown network 'EDSRR'; did you mean 'EDSR'?"),
        (['network_g', 'num_blocks'], 4, "unknown argument of EDSR 'num_blocks'; did you mean 'num_block'?"),
        (['network_r'], None, "network_r is missing: drtl.weighting.relation 'embedding' needs a DRN"),
        (['drtl', 'weighting', 'relation'], 'transferr', "unknown estimator 'transferr'; did you mean 'transfer'?"),
        (['drtl', 'weighting', 'relation'], 'transfer', 'first be measured at iteration 2, but total_iter is 2'),
        (['train', 'total_iter'], 0, r'train.total_iter: 0 is out of range'),
        (['drtl', 'inner'], {'algorithm': 'reptile'}, 'drtl.inner.steps: reptile needs at least 2'),
        (
            ['drtl', 'inner'],
            {'algorithm': 'reptile', 'steps': 2, 'parameters': ['conv_last.*']},
            'reptile trains only what',
        ),
        (
            ['drtl', 'inner'],
            {'algorithm': 'reptile', 'steps': 2, 'rate_lr': 0.1},
            'drtl.inner.rate_lr: only pipeline: meta',
        ),
        (['drtl', 'inner'], {'checkpoint': True}, 'drtl.inner.checkpoint: only pipeline: meta with maml stores'),
        (['drtl', 'adapt'], {'replay': 0.5, 'batch_size': 1}, 'replay needs at least 2 patches'),
        (['drtl', 'adapt', 'rank'], 2, 'drtl.adapt.rank was removed: adaptation trains all weights'),
        (['datasets', 'train', 'camera_fit'], True, 'datasets.train.camera_fit was removed: set drtl.camera_fit'),
        (['model_type'], 'DRTModel', "model_type: unknown model 'DRTModel'; did you mean 'DRTLModel'?"),
        (['datasets', 'train', 'type'], 'DistortionTask', "did you mean 'DistortionTaskDataset'?"),
        (['datasets', 'train', 'type'], 'PairedImageDataset', 'datasets.train.dataroot_lq is missing'),
        (['train', 'pixel_opt', 'type'], 'L1', "train.pixel_opt.type: unknown loss 'L1'"),
        (['val', 'metrics', 'psnr_y', 'type'], 'psnr', "val.metrics.psnr_y.type: unknown metric 'psnr'"),
        (['path', 'pretrain_network_g'], 'no.pth', 'path.pretrain_network_g: there is no file no.pth'),
        (['drtl', 'weighting', 'effective_tasks'], 4, 'effective_tasks: 4 of 4 tasks means equal weights; lower it'),
        (['train', 'scheduler'], {'periods': [1]}, 'train.scheduler.periods: [1] end before total_iter 2'),
        (['train', 'total_iter'], 'many', "train.total_iter: expected a whole number, got 'many'"),
        (['drtl', 'target_weight'], 0.1, 'drtl.target_weight was removed: drtl.adapt trains on'),
        (['network_g', 'upscale'], 2, 'network_g enlarges 2 times, but scale is 4'),
        (['network_g'], None, 'network_g is missing'),
        (['network_g'], 'EDSR', "network_g: expected a section of keys and values, got 'EDSR'"),
        (['train', 'optim_g', 'type'], 'Adamm', "train.optim_g.type: unknown optim 'Adamm'; did you mean 'Adam'?"),
        (['train', 'optim_g'], {}, "train.optim_g.type: unknown optim 'None'; known: Adam."),
        (['train', 'scheduler', 'type'], 'Step', "unknown scheduler 'Step'; known: CosineAnnealingRestartLR, Mu"),
        (['train', 'scheduler', 'periods'], ['a'], "train.scheduler.periods: expected a whole number, got 'a'"),
        (['train', 5], 1, 'the key 5 is not text'),
        (['path', 'pretrain_network_g'], 5, 'path.pretrain_network_g: expected text, got 5'),
        (['datasets', 'val', 'dataroot_gt'], ['a'], "datasets.val.dataroot_gt: expected a folder, got ['a']"),
        (
            ['logger'],
            {'wandb': {'project': 'x'}, 'use_tb_logger': False},
            'logger.wandb: Weights & Biases requires use_tb',
        ),
        (['train', 'pixel_opt', 'loss_wait'], 1, "unexpected keyword argument 'loss_wait'"),
        (['train', 'pixel_opt'], None, 'train: pixel_opt or perceptual_opt is missing'),
        (['datasets', 'train', 'io_backend', 'type'], 'dsk', 'datasets.train.io_backend: expected a type of disk'),
        (['datasets', 'val', 'io_backend'], {}, 'datasets.val.io_backend: expected a type of disk'),
        (['datasets', 'val'], None, 'datasets.val: expected a section with name and type'),
        (['datasets', 'train', 'batch_size_per_gpu'], 'many', 'batch_size_per_gpu: expected a whole number'),
        (['val', 'metrics', 'psnr_y'], None, 'val.metrics.psnr_y: expected a section with type, got None'),
        (['train', 'ema_decy'], 0.9, "train: unknown key 'ema_decy'; did you mean 'ema_decay'?"),
        (['train', 'ema_decay'], 1.5, 'train.ema_decay: 1.5 is out of range; it must be between 0 and 1'),
        (['train', 'warmup_iters'], 5, "train: unknown key 'warmup_iters'; did you mean 'warmup_iter'?"),
        (['train', 'amp'], 'fp16', "train.amp: 'fp16' is not one of bf16"),
        (['train', 'scheduler'], None, 'train.scheduler: expected a section of keys and values, got None'),
        (['val', 'val_frq'], 5, "val: unknown key 'val_frq'; did you mean 'val_freq'?"),
        (['val', 'val_freq'], 0, 'val.val_freq: 0 is out of range; it must be at least 1'),
        (['val', 'save_img'], 'often', "val.save_img: expected true or false, got 'often'"),
        (['val', 'suffix'], '/../../x', "val.suffix: expected the name of a folder, got 'image/../../x'"),
        (
            ['val', 'metrics', 'psnr_y', 'crop_boder'],
            4,
            "calculate_psnr 'crop_boder'; did you mean 'crop_border",
        ),
        (
            ['val', 'metrics', 'psnr_y'],
            {'type': 'calculate_psnr'},
            'psnr_y: calculate_psnr needs crop_border',
        ),
        (['val', 'metrics', 'psnr_y', 'better'], 'more', "psnr_y.better: 'more' is not one of higher, lower"),
        (['logger', 'print_freq'], 0, 'logger.print_freq: 0 is out of range'),
        (['logger', 'keep_checkpoint'], 3, "unknown key 'keep_checkpoint'; did you mean 'keep_checkpoints'?"),
        (['logger', 'keep_checkpoints'], 0, 'logger.keep_checkpoints: 0 is out of range'),
        (['logger', 'use_tb_logger'], 3, 'logger.use_tb_logger: expected true or false, got 3'),
        (['path', 'pretrain_network'], 'x', "path: unknown key 'pretrain_network'; did you mean 'pretrain_network_"),
        (['path', 'strict_load_g'], 'maybe', "path.strict_load_g: expected true or false, got 'maybe'"),
        (['network_x'], {'type': 'UNet'}, "option file: unknown key 'network_x'; did you mean 'network_"),
        (['scal'], 4, "option file: unknown key 'scal'; did you mean 'scale'?"),
        (['drtll'], {}, "option file: unknown key 'drtll'; did you mean 'drtl'?"),
        (['num_gpu'], 'some', "num_gpu: expected a whole number or auto, got 'some'"),
        (['scale'], 0, 'scale: 0 is out of range'),
        (['manual_seed'], -1, 'manual_seed: -1 is out of range'),
        (['dist_params', 'port'], 70000, 'dist_params.port: 70000 is out of range'),
        (['dist_params'], 'nccl', "dist_params: expected a section of keys and values, got 'nccl'"),
        (['datasets', 'valid'], {'name': 'x', 'type': 'y'}, "datasets: unknown dataset 'valid'; did you mean 'val'?"),
        (['datasets', 'val', 'name'], '../../x', "datasets.val.name: expected the name of a folder, got '../../x'"),
        (['datasets', 'val', 'filename_tmp'], '{}', "datasets.val: unknown key 'filename_tmp'; did you mean 'filename"),
        (['datasets', 'val', 'type'], 'PairedImageDatset', "unknown dataset 'PairedImageDatset'; did you mean 'Paired"),
        (['datasets', 'val', 'color'], 'yuv', "datasets.val.color: 'yuv' is not one of rgb, y"),
        (['name'], '..', "name: expected the name of a folder, got '..'"),
        (['name'], 'a/b', "name: expected the name of a folder, got 'a/b'"),
        (['name'], 123, 'name: expected the name of a folder, got 123'),
        (['val', 'tile'], -1, 'val.tile: -1 is out of range'),
        (['manual_seed'], 'abc', "manual_seed: expected a whole number, got 'abc'"),
        (['drtl', 'hooks'], [{'type': 'RelationHook', 'interval': 'abc'}], 'interval: expected a whole number'),
        (['drtl', 'hooks'], [{'type': 'RelationHook', 'drn_lr': math.inf}], 'drn_lr: expected a number, got inf'),
        (
            ['drtl', 'hooks'],
            [{'type': 'RelationHook', 'interval': 2}, {'type': 'RelationHook', 'interval': 3}],
            'drtl.hooks[1]: there can be only one RelationHook; write its arguments into one entry',
        ),
        (['drtl', 'adapt', 'lr'], math.inf, 'drtl.adapt.lr: expected a number or a list of numbers, got inf'),
        (['drtl', 'inner'], {'lr': 10**400}, 'drtl.inner.lr: expected a number, got 1000'),
        (['train', 'optim_g', 'lr'], math.inf, 'train.optim_g.lr: expected a number, got inf'),
        (['find_unused_parameters'], True, 'find_unused_parameters: DRTLModel averages gradients without'),
        (['model_type'], ['DRTLModel'], "model_type: expected text, got ['DRTLModel']"),
        (['datasets', 'train', 'type'], ['a'], 'datasets.train.type: unknown dataset'),
    ]

    @pytest.mark.parametrize(('keys', 'value', 'message'), CASES, ids=lambda case: None)
    def test_is_named_before_anything_is_touched(self, workdir, quick_opt, write_opt, capsys, keys, value, message):
        older = workdir / 'experiments/drtl_x4'
        older.mkdir(parents=True)
        section = quick_opt
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
        error = capsys.readouterr().err
        assert error.startswith('basicsr: error: ')
        assert message in error
        assert error.count('\n') == 1
        assert [path.name for path in (workdir / 'experiments').iterdir()] == ['drtl_x4']
        assert not (workdir / 'tb_logger').exists()

    @pytest.mark.parametrize(
        ('fault', 'message'),
        [
            ('small', 'drtl.camera_fit: a camera fit needs GT images of at least 80 pixels a side. Turn it off with '),
            ('black', 'drtl.camera_fit: a camera cannot be fitted: all LQ images are black in red. Turn it off with '),
            ('label', "datasets.train.distortions: a task is labelled 'camera fit'; give it another label."),
        ],
    )
    def test_cameras_that_cannot_be_fitted(self, workdir, quick_opt, write_opt, capsys, fault, message):
        (workdir / 'experiments/drtl_x4').mkdir(parents=True)
        quick_opt['drtl']['camera_fit'] = True
        train = quick_opt['datasets']['train']
        if fault == 'label':
            train['distortions'][0]['label'] = 'camera fit'
        else:
            side = 64 if fault == 'small' else 96
            lq = np.full((side // 4, side // 4, 3), (9, 9, 0), np.uint8)
            for folder, image in (('gt', np.full((side, side, 3), 9, np.uint8)), ('lq', lq)):
                (workdir / folder).mkdir()
                cv2.imwrite(str(workdir / folder / 'a.png'), image)
                train['target'][f'dataroot_{folder}'] = folder
            train['target']['num_shot'] = 1
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f'basicsr: error: {message}')
        assert error.count('\n') == 1
        assert [path.name for path in (workdir / 'experiments').iterdir()] == ['drtl_x4']
        assert not (workdir / 'tb_logger').exists()

    def test_misspelt_sections_that_must_be_there(self, workdir, quick_opt, write_opt, capsys):
        quick_opt['datests'] = quick_opt.pop('datasets')
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
        assert "the key 'datasets' is missing; is 'datests' a misspelling of it?" in capsys.readouterr().err

    @pytest.mark.parametrize(
        'keys', ['train:total_iter', 'logger:print_freq', 'val:save_img', 'val:val_freq', 'train:scheduler']
    )
    def test_keys_that_basicsr_looks_up(self, workdir, quick_opt, write_opt, capsys, keys):
        section, key = keys.split(':')
        del quick_opt[section][key]
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
        assert f'{section}.{key} is missing' in capsys.readouterr().err

    def test_weights_that_are_none(self, workdir, quick_opt, write_opt, capsys):
        (workdir / 'weights.pth').write_text('no weights')
        quick_opt['path']['pretrain_network_g'] = 'weights.pth'
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
        assert 'weights.pth is damaged, or contains no weights or state' in capsys.readouterr().err
        torch.save({'params': {'other.weight': torch.zeros(1)}}, workdir / 'weights.pth')
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
        error = capsys.readouterr().err
        assert 'path.pretrain_network_g: weights.pth does not fit network_g: weights: 14 missing (conv_first.' in error
        assert error.endswith(', …), 1 unexpected (other.weight).\n')
        assert error.count('\n') == 1

    def test_images_that_loader_processes_cannot_decode(self, workdir, quick_opt, write_opt, capsys):
        content = bytearray((workdir / SAMPLE_ROOT / 'auxiliary/brick.png').read_bytes())
        content[60:70] = b'0123456789'  # between a good header and a good end
        (workdir / 'gt').mkdir()
        (workdir / 'gt/cut.png').write_bytes(content)
        quick_opt['datasets']['train'].update(dataroot_gt='gt', num_worker_per_gpu=1)
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == 'basicsr: error: gt/cut.png of gt: cannot be read as an image.'

    def test_names_of_files_with_line_breaks(self, workdir, quick_opt, write_opt, capsys):
        shutil.copytree(workdir / SAMPLE_ROOT / 'camera/val', workdir / 'bad')
        (workdir / 'bad/gt/coffee.png').rename(workdir / 'bad/gt/cof\nfee.png')
        quick_opt['datasets']['val'].update(dataroot_gt='bad/gt', dataroot_lq='bad/lq')
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
        assert capsys.readouterr().err == 'basicsr: error: datasets.val: cof fee.png is not in lq_paths.\n'
        assert cli.main(['upscale', '-i', 'bad', '-o', 'out', '--weights', 'no\nweights.pth']) == 2
        error = capsys.readouterr().err
        assert error.startswith('basicsr: error: --weights: ') and 'no weights.pth' in error
        assert error.count('\n') == 1

    def test_modules_that_are_missing(self, workdir, quick_opt, write_opt, capsys):
        assert cli.main(['train', '-opt', write_opt(quick_opt), '--import', 'nosuchmodule']) == 2
        assert "--import nosuchmodule: No module named 'nosuchmodule'" in capsys.readouterr().err

    def test_network_arguments_that_are_missing(self, workdir, quick_opt, write_opt, capsys):
        del quick_opt['network_g']['num_in_ch']
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
        assert 'network_g: EDSR needs num_in_ch' in capsys.readouterr().err

    def test_weights_for_a_test_that_are_missing(self, workdir, capsys):
        assert cli.main(['test', '-opt', str(OPTIONS / 'test_drtl_x4.yml')]) == 2
        assert 'there is no file experiments/drtl_x4/models/net_g_adapted_latest.pth' in capsys.readouterr().err

    def test_option_file_that_is_missing(self, workdir, capsys):
        assert cli.main(['train', '-opt', 'nowhere.yml']) == 2
        assert 'nowhere.yml: cannot read the option file' in capsys.readouterr().err
