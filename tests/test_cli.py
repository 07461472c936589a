"""The command as a user runs it, on the sample data, cut down to seconds."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.data.transforms import mod_crop
from basicsr.metrics import calculate_psnr
from basicsr.utils import img2tensor, tensor2img
from basicsr.utils.matlab_functions import imresize

import drtl_plugin
from drtl_plugin import cli
from drtl_plugin.data import lmdb_files
from drtl_plugin.sources.sample import SAMPLE_ROOT
from drtl_plugin.tasks.camera_fit import CameraFit
from tests.conftest import OPTIONS


@pytest.fixture
def plain_opt(quick_opt) -> dict:
    """A BasicSR option file without anything of this plug-in."""
    opt = {key: quick_opt[key] for key in ('scale', 'manual_seed', 'network_g', 'val', 'logger', 'train')}
    camera = 'datasets/drtl_sample/camera'
    opt.update(
        name='plain',
        model_type='SRModel',
        num_gpu=1,
        datasets={
            'train': {
                'name': 'pairs',
                'type': 'PairedImageDataset',
                'dataroot_gt': f'{camera}/support/gt',
                'dataroot_lq': f'{camera}/support/lq',
                'io_backend': {'type': 'disk'},
                'gt_size': 64,
                'use_hflip': True,
                'use_rot': True,
                'num_worker_per_gpu': 1,
                'batch_size_per_gpu': 2,
                'dataset_enlarge_ratio': 2,
                'prefetch_mode': None,
            },
            'val': quick_opt['datasets']['val'],
        },
        path={'pretrain_network_g': None, 'strict_load_g': True, 'resume_state': None},
    )
    return opt


def as_test(opt: dict, weights: Path, **dataset) -> dict:
    """Options that test what ``opt`` has trained."""
    val = {**opt['datasets']['val'], **dataset}
    return {
        **{key: opt[key] for key in ('model_type', 'scale', 'num_gpu', 'manual_seed', 'network_g')},
        'name': f'test_{opt["name"]}',
        'datasets': {'test_1': val},
        'path': {'pretrain_network_g': str(weights), 'strict_load_g': True},
        'val': {**opt['val'], 'suffix': None},
    }


def logged_metrics(folder: Path) -> dict[str, str]:
    """Metrics of the last validation in the log, as text."""
    log = sorted(folder.glob('*.log'))[-1].read_text()
    return dict(re.findall(r'# (\w+): ([\d.]+)', log[log.rindex('Validation ') :]))


class TestTrain:
    @pytest.mark.parametrize('pipeline', ['meta', 'pretrain'])
    def test_reports_before_and_after_adaptation(self, workdir, quick_opt, write_opt, capsys, pipeline):
        quick_opt['drtl']['pipeline'] = pipeline
        quick_opt['val']['save_img'] = True
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        command, *lines = capsys.readouterr().out.splitlines()[-5:]
        assert re.fullmatch(r'sample_camera\s+psnr_y\s+ssim_y', lines[0])
        # It says what to type next.
        command = command.partition(': basicsr ')[2].replace('IN', f'{SAMPLE_ROOT}/camera/val/lq')
        assert cli.main(command.split()) == 0
        assert len(list((workdir / 'OUT').iterdir())) == 3
        for line, words in zip(lines[1:], ('bicubic upsampling', 'before adaptation', 'after adaptation'), strict=True):
            assert re.fullmatch(rf'  {words}\s+\d+\.\d{{4}}\s+0\.\d{{4}}', line)

        root = workdir / 'experiments/drtl_x4'
        for name in ('net_g', 'net_g_adapted', 'net_r'):
            assert 'params' in torch.load(root / f'models/{name}_latest.pth', weights_only=True)
        assert cv2.imread(str(root / 'knowledge_graph.png')) is not None
        assert cv2.imread(str(root / 'comparison_sample_camera.png')) is not None
        assert len(list(root.glob('visualization*/*/*.png'))) == 6  # three images, before and after
        log = next(root.glob('*.log')).read_text()
        for name in ('sample_camera_bicubic', 'sample_camera', 'sample_camera_adapted'):
            assert f'Validation {name}\n' in log
        assert 'Relation to the target and gradient weight' in log
        graph = json.loads((root / 'knowledge_graph.json').read_text())
        assert len(graph['labels']) == 4
        assert np.mean(graph['weights']) == pytest.approx(1)

    @pytest.mark.slow
    def test_adaptation_gains_on_photographs_that_were_not_seen(self, workdir, write_opt, capsys):
        """The point of it all, in two minutes instead of ten: against a run without relation and fit.

        They gain before adaptation (26.06 against 25.50 dB, bicubic 25.46 dB; on another machine, 26.19 against 25.50
        dB, and with seed 1, 26.12 against 25.49 dB). After adaptation, 0.1 dB of it is left (26.43 and 26.33 dB).
        """

        def trained(opt: dict) -> list[float]:
            """PSNR-Y of bicubic upsampling, before adaptation, and after it."""
            assert cli.main(['train', '-opt', write_opt(opt)]) == 0
            return [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()[-3:]]

        opt = yaml.safe_load((OPTIONS / 'drtl_x4.yml').read_text(encoding='utf-8'))
        opt['datasets']['train'].update(num_worker_per_gpu=0, gt_size=64, num_support=2, num_query=2)
        scheduler = {'type': 'MultiStepLR', 'milestones': [120], 'gamma': 0.3}
        opt['train'].update(total_iter=150, ema_decay=0.9, scheduler=scheduler)
        opt['drtl']['adapt']['steps'] = 40
        opt['drtl']['hooks'][0].update(interval=50, transfer_steps=5)
        bicubic, before, after = trained(opt)
        opt['drtl'].update(camera_fit=False, weighting={'relation': 'uniform'})
        _, plain_before, plain_after = trained(opt)
        assert before > plain_before + 0.3
        assert plain_after > plain_before + 0.3
        assert min(before, after, plain_after) > bicubic + 0.5

    @pytest.mark.slow
    def test_camera_fit_is_kept_drawn_and_doubted(self, workdir, quick_opt, write_opt):
        quick_opt['drtl']['camera_fit'] = True
        quick_opt['datasets']['train']['target']['num_shot'] = 1
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        root = workdir / 'experiments/drtl_x4'
        fit = CameraFit.from_state(torch.load(root / 'camera_fit.pth'))
        assert cv2.imread(str(root / 'camera_fit.png')) is not None
        log = next(root.glob('*.log')).read_text()
        assert fit.summary() in log
        assert 'Do not trust the camera fit: it is fitted to a single pair' in log
        assert json.loads((root / 'knowledge_graph.json').read_text())['labels'][-1] == 'camera fit'

    @pytest.mark.slow
    def test_validation_sets_may_be_several_or_none(self, workdir, quick_opt, write_opt, capsys):
        quick_opt['train']['ema_decay'] = 0
        quick_opt['datasets']['val_2'] = {**quick_opt['datasets']['val'], 'name': 'other'}
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()[-8:]]
        assert [rows[0][0], rows[4][0]] == ['sample_camera', 'other']
        assert rows[1:4] == rows[5:8]
        assert (workdir / 'experiments/drtl_x4/comparison_other.png').is_file()
        quick_opt['val'] = None
        del quick_opt['datasets']['val'], quick_opt['datasets']['val_2']
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        assert (workdir / 'experiments/drtl_x4/models/net_g_adapted_latest.pth').is_file()

    def test_tensorboard_has_both_sets_of_metrics_and_the_weights(self, workdir, quick_opt, write_opt):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        events = EventAccumulator(str(workdir / 'tb_logger/drtl_x4')).Reload()
        tags = events.Tags()['scalars']
        assert {'metrics/sample_camera/psnr_y', 'metrics/sample_camera_adapted/psnr_y', 'losses/l_query'} <= set(tags)
        weights = [events.Scalars(tag)[-1].value for tag in tags if tag.startswith('weights/')]
        assert np.mean(weights) == pytest.approx(1, abs=1e-5)
        crops = events.Images('comparison/sample_camera')[-1]
        rates = [(event.step, event.value) for event in events.Scalars('lr')]
        assert rates == [(1, pytest.approx(1e-3)), (2, pytest.approx(1e-3))]
        (tag,) = (tag for tag in events.Tags()['tensors'] if tag.startswith('options/'))
        (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag))
        shown = re.fullmatch(r'```yaml\n(.*)\n```', text, re.DOTALL)[1]
        assert yaml.safe_load(shown) == quick_opt
        caption, tile = 22, 192
        assert (crops.width, crops.height) == (4 * tile, caption + 3 * tile)  # four columns, three photographs

    @pytest.mark.slow
    def test_same_options_give_the_same_numbers(self, workdir, quick_opt, write_opt):
        quick_opt['datasets']['train']['num_worker_per_gpu'] = 1
        results = []
        for name in ('first', 'second'):
            assert cli.main(['train', '-opt', write_opt({**quick_opt, 'name': name})]) == 0
            results.append(torch.load(workdir / f'experiments/{name}/models/net_g_adapted_latest.pth'))
        for key, value in results[0]['params'].items():
            assert torch.equal(value, results[1]['params'][key]), key

    def test_adapted_metrics_are_those_of_the_saved_network(self, workdir, quick_opt, write_opt, capsys):
        """What validation reports is what SRModel gives with the weights that were kept."""
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        reported = capsys.readouterr().out.splitlines()[-3:]
        models = workdir / 'experiments/drtl_x4/models'
        for line, weights, key in (
            (reported[1], 'net_g_latest.pth', 'params_ema'),
            (reported[2], 'net_g_adapted_latest.pth', 'params'),
        ):
            opt = as_test({**quick_opt, 'model_type': 'SRModel'}, models / weights)
            opt['path']['param_key_g'] = key
            assert cli.main(['test', '-opt', write_opt(opt)]) == 0
            assert capsys.readouterr().out.endswith(f'in {workdir / "results/test_drtl_x4"}.\n')
            metrics = logged_metrics(workdir / 'results/test_drtl_x4')
            assert line.split()[-2:] == [metrics['psnr_y'], metrics['ssim_y']]

    def test_auto_resume_goes_on_on_the_cpu(self, workdir, quick_opt, write_opt):
        quick_opt['logger']['save_checkpoint_freq'] = 1
        path = write_opt(quick_opt)
        assert cli.main(['train', '-opt', path]) == 0
        assert cli.main(['train', '-opt', path, '--auto_resume', '--force_yml', 'train:total_iter=3']) == 0
        states = sorted(path.name for path in (workdir / 'experiments/drtl_x4/training_states').iterdir())
        assert states == ['1.state', '2.state', '3.state']
        assert not list((workdir / 'experiments').glob('*archived*'))
        resumed = torch.load(workdir / 'experiments/drtl_x4/models/net_g_latest.pth', weights_only=True)
        whole = {**quick_opt, 'name': 'whole'}
        whole['train']['total_iter'] = 3
        assert cli.main(['train', '-opt', write_opt(whole)]) == 0
        expected = torch.load(workdir / 'experiments/whole/models/net_g_latest.pth', weights_only=True)
        for key in ('params', 'params_ema'):
            assert all(torch.equal(value, resumed[key][name]) for name, value in expected[key].items())

    @pytest.mark.slow
    def test_finished_runs_can_be_extended(self, workdir, quick_opt, write_opt):
        cosine = {'type': 'CosineAnnealingRestartLR', 'periods': [2], 'restart_weights': [1], 'eta_min': 1e-7}
        quick_opt['train']['scheduler'] = cosine
        quick_opt['logger']['save_checkpoint_freq'] = 2
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        longer = ['--auto_resume', '--force_yml', 'train:total_iter=5', 'train:scheduler:periods=[5]']
        assert cli.main(['train', '-opt', write_opt(quick_opt), *longer]) == 0
        log = sorted((workdir / 'experiments/drtl_x4').glob('*.log'))[-1].read_text()
        assert 'iter:       5' in log

    def test_hooks_of_ones_own_are_imported_from_the_current_folder(self, workdir, quick_opt, write_opt, capsys):
        (workdir / 'my_hook_module.py').write_text(
            'from drtl_plugin.hooks import META_HOOK_REGISTRY, MetaTrainerHook\n'
            '@META_HOOK_REGISTRY.register()\n'
            'class ShoutHook(MetaTrainerHook):\n'
            '    def after_train(self, runner):\n'
            '        print("after", runner.num_update, "updates")\n'
        )
        quick_opt['drtl']['hooks'].append({'type': 'ShoutHook'})
        path = write_opt(quick_opt)
        assert cli.main(['train', '-opt', path]) == 2
        assert cli.main(['train', '-opt', path, '--import', 'my_hook_module']) == 0
        assert 'after 2 updates' in capsys.readouterr().out

    def test_sample_data_is_written_where_it_is_missing(self, tmp_path, monkeypatch, quick_opt, write_opt):
        monkeypatch.chdir(tmp_path)
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        assert (tmp_path / SAMPLE_ROOT / 'camera/val/lq/coffee.png').is_file()


class TestTest:
    @pytest.fixture(params=['sample', 'set5'])
    def tested(self, workdir, quick_opt, write_opt, request) -> Path:
        """Test a network on bicubic reductions of some photographs; the folder has ``gt`` and ``lq``."""
        source = workdir / SAMPLE_ROOT / 'camera/val/gt'
        if request.param == 'set5':
            source = request.getfixturevalue('real_data') / 'set5/hr'
        folder = workdir / 'bench'
        for side in ('gt', 'lq'):
            (folder / side).mkdir(parents=True)
        for path in sorted(source.iterdir()):
            gt = mod_crop(cv2.imread(str(path)), 4)
            lq = (imresize(gt / 255, 0.25) * 255).round().clip(0, 255)
            cv2.imwrite(str(folder / 'gt' / path.name), gt)
            cv2.imwrite(str(folder / 'lq' / path.name.replace('.png', 'x4.png')), lq)
        cv2.imwrite(str(folder / 'gt/flat.png'), np.full((64, 64, 3), 128))  # upsampling is perfect
        cv2.imwrite(str(folder / 'lq/flatx4.png'), np.full((16, 16, 3), 128))
        torch.manual_seed(0)
        torch.save({'params_ema': build_network(quick_opt['network_g']).state_dict()}, workdir / 'w.pth')
        data = {'dataroot_gt': 'bench/gt', 'dataroot_lq': 'bench/lq', 'filename_tmpl': '{}x4', 'name': request.param}
        opt = as_test(quick_opt, workdir / 'w.pth', **data)
        opt['path']['param_key_g'] = 'params_ema'
        assert cli.main(['test', '-opt', write_opt(opt)]) == 0
        return folder

    def test_images_are_compared_with_bicubic_upsampling(self, workdir, quick_opt, tested, request):
        dataset = 'set5' if 'set5' in request.node.name else 'sample'
        rows = (workdir / f'results/test_drtl_x4/metrics_{dataset}.csv').read_text().splitlines()
        assert rows.pop(0) == 'image,method,psnr_y,ssim_y'
        rows = [row.split(',') for row in rows]
        values = {(name, method): float(psnr) for name, method, psnr, _ in rows}
        names = sorted(path.stem for path in (tested / 'lq').iterdir())
        assert [row[:2] for row in rows] == [[n, m] for n in names for m in ('bicubic upsampling', 'network')]
        network = build_network(quick_opt['network_g']).eval()
        network.load_state_dict(torch.load('w.pth')['params_ema'])
        for name in names:
            gt, lq = cv2.imread(f'bench/gt/{name[:-2]}.png'), cv2.imread(f'bench/lq/{name}.png')
            with torch.no_grad():
                restored = tensor2img(network(img2tensor(lq / np.float32(255))[None]))
            options = {'crop_border': 4, 'test_y_channel': True}
            assert values[name, 'network'] == pytest.approx(calculate_psnr(restored, gt, **options), abs=1e-3)
            if name == 'flatx4':
                assert values[name, 'bicubic upsampling'] == float('inf')
                continue
            upsampled = (imresize(lq / 255, 4) * 255).round().clip(0, 255)
            expected = calculate_psnr(upsampled, gt, **options)
            assert values[name, 'bicubic upsampling'] == pytest.approx(expected, abs=0.05)
        bicubic = [value for (_, method), value in values.items() if method != 'network']
        if dataset == 'set5':  # the figure of the literature
            assert np.mean([value for value in bicubic if value < 100]) == pytest.approx(28.42, abs=0.05)

    def test_the_log_has_a_table_of_means(self, workdir, tested):
        results = workdir / 'results/test_drtl_x4'
        log = next(results.glob('*.log')).read_text()
        (csv_file,) = results.glob('metrics_*.csv')
        assert f'the metrics of each are in {csv_file}.' in log
        head, bicubic, network = log[log.rindex('Mean over') :].splitlines()[1:4]
        assert head.split()[1:] == ['psnr_y', 'ssim_y']
        rows = [row.split(',') for row in csv_file.read_text().splitlines()[1:]]
        for line, method in ((bicubic, 'bicubic upsampling'), (network, 'network')):
            means = np.mean([[float(v) for v in row[2:]] for row in rows if row[1] == method], axis=0)
            assert line.split() == [*method.split(), *(f'{mean:.4f}' for mean in means)]
        metrics = logged_metrics(results)
        assert network.split()[1:] == [metrics['psnr_y'], metrics['ssim_y']]

    def test_without_ground_truth_only_the_network_is_tested(self, workdir, quick_opt, write_opt):
        torch.save({'params': build_network(quick_opt['network_g']).state_dict()}, workdir / 'w.pth')
        opt = as_test(quick_opt, workdir / 'w.pth', type='SingleImageDataset')
        del opt['datasets']['test_1']['dataroot_gt']
        opt['val'].update(metrics=None, save_img=True)
        assert cli.main(['test', '-opt', write_opt(opt)]) == 0
        results = workdir / 'results/test_drtl_x4'
        assert len(list((results / 'visualization/sample_camera').iterdir())) == 3
        assert not list(results.glob('*.csv'))


class TestPlainBasicSR:
    def test_plain_option_files_train_and_test(self, workdir, plain_opt, write_opt):
        assert cli.main(['train', '-opt', write_opt(plain_opt)]) == 0
        opt = as_test(plain_opt, workdir / 'experiments/plain/models/net_g_latest.pth')
        opt['val']['save_img'] = True
        assert cli.main(['test', '-opt', write_opt(opt)]) == 0
        assert len(list((workdir / 'results/test_plain/visualization/sample_camera').glob('*_test_plain.png'))) == 3
        assert float(logged_metrics(workdir / 'results/test_plain')['psnr_y']) > 5

    def test_models_that_call_cuda_run_without(self, workdir, plain_opt, write_opt, monkeypatch):
        monkeypatch.setattr('torch.cuda.is_available', lambda: False)
        plain_opt['model_type'] = 'RealESRNetModel'
        for name in ('resize_prob', 'resize_prob2'):
            plain_opt[name] = [0.2, 0.7, 0.1]
        plain_opt.update(
            resize_range=[0.5, 1.5], gaussian_noise_prob=0.5, noise_range=[1, 30], poisson_scale_range=[0.05, 3],
            gray_noise_prob=0.4, jpeg_range=[30, 95], second_blur_prob=0.8, resize_range2=[0.5, 1.2],
            gaussian_noise_prob2=0.5, noise_range2=[1, 25], poisson_scale_range2=[0.05, 2.5], gray_noise_prob2=0.4,
            jpeg_range2=[30, 95], gt_usm=True, queue_size=4, high_order_degradation=True,
        )  # fmt: skip
        blur = {
            'blur_kernel_size': 21, 'kernel_list': ['iso', 'aniso'], 'kernel_prob': [0.5, 0.5], 'sinc_prob': 0.1,
            'blur_sigma': [0.2, 3], 'betag_range': [0.5, 4], 'betap_range': [1, 2],
        }  # fmt: skip
        dataset = plain_opt['datasets']['train']
        del dataset['dataroot_lq']
        (workdir / 'meta.txt').write_text('brick.png\ngrass.png\n')
        dataset.update(blur, type='RealESRGANDataset', dataroot_gt=f'{SAMPLE_ROOT}/auxiliary', meta_info='meta.txt')
        dataset.update({f'{key}2': value for key, value in blur.items()}, final_sinc_prob=0.8)
        plain_opt['gt_size'] = 64
        assert cli.main(['train', '-opt', write_opt(plain_opt)]) == 0


class TestLmdb:
    @pytest.fixture(params=['sample', 'set5'])
    def benchmark(self, workdir, request) -> dict[str, Path]:
        """Ground truth and x4 bicubic reduction of some images, in folders."""
        if request.param == 'sample':
            source = workdir / SAMPLE_ROOT / 'camera/val/gt'
        else:
            source = request.getfixturevalue('real_data') / 'set5/hr'
        folders = {key: workdir / 'bench' / key for key in ('gt', 'lq')}
        for folder in folders.values():
            folder.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            gt = mod_crop(cv2.imread(str(path)), 4)
            lq = imresize(gt / 255, 0.25)
            cv2.imwrite(str(folders['gt'] / path.name), gt)
            cv2.imwrite(str(folders['lq'] / path.name.replace('.png', 'x4.png')), (lq * 255).round().clip(0, 255))
        return folders

    def test_metrics_equal_those_from_disk(self, workdir, benchmark, quick_opt, write_opt):
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        weights = workdir / 'experiments/drtl_x4/models/net_g_adapted_latest.pth'
        assert cli.main(['lmdb', str(benchmark['gt']), 'bench/gt.lmdb']) == 0
        assert cli.main(['lmdb', str(benchmark['lq']), 'bench/lq.lmdb', '--strip', 'x4']) == 0
        disk = as_test(
            quick_opt, weights, dataroot_gt='bench/gt', dataroot_lq='bench/lq', filename_tmpl='{}x4', name='bench'
        )
        lmdb = as_test(
            quick_opt, weights, dataroot_gt='bench/gt.lmdb', dataroot_lq='bench/lq.lmdb', name='bench',
            io_backend={'type': 'lmdb'},
        )  # fmt: skip
        results = []
        for opt in (disk, lmdb):
            assert cli.main(['test', '-opt', write_opt(opt)]) == 0
            results.append(logged_metrics(workdir / 'results/test_drtl_x4'))
        assert results[0] == results[1]
        assert set(results[0]) == {'psnr_y', 'ssim_y'}

    def test_holds_images_that_differ_much_in_size(self, workdir):
        """BasicSR's own reservation of space, ten times the first image, is too small for these."""
        from basicsr.utils import FileClient, imfrombytes

        (workdir / 'mixed').mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3)).astype(np.uint8)
        for name, image in (('a', noise[:8, :8]), ('b', noise), ('c', noise)):
            cv2.imwrite(str(workdir / 'mixed' / f'{name}.png'), image)
        assert cli.main(['lmdb', 'mixed', 'mixed.lmdb']) == 0
        client = FileClient('lmdb', db_paths='mixed.lmdb', client_keys='gt')
        assert np.array_equal(imfrombytes(client.get('c', 'gt')), noise)

    def test_a_failure_leaves_nothing_under_the_final_name(self, workdir, benchmark, monkeypatch, capsys):
        def fail(maker, *_):
            raise OSError(errno.ENOSPC, 'No space left on device', maker.lmdb_path)

        monkeypatch.setattr(lmdb_files.LmdbMaker, 'put', fail)
        before = sorted(workdir.iterdir())
        assert cli.main(['lmdb', 'bench/gt', 'x.lmdb']) == 2
        assert 'basicsr: error: [Errno 28] No space left on device' in capsys.readouterr().err
        assert sorted(workdir.iterdir()) == before

    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            (['broken', 'x.lmdb'], 'a.png: cannot be read as an image'),
            (['nowhere', 'x.lmdb'], 'folder: there is no folder nowhere'),
            (['empty', 'x.lmdb'], 'contains no images'),
            (['bench/gt', 'x'], 'the name must end in .lmdb'),
            (['bench/gt', 'empty.lmdb'], 'empty.lmdb exists'),
            (['dots', 'x.lmdb'], 'a.b cannot be an LMDB key'),
            (['twice', 'x.lmdb'], 'more than one image named a'),
        ],
    )
    def test_wrong_calls_are_named(self, workdir, benchmark, capsys, arguments, message):
        for name in ('empty', 'empty.lmdb', 'dots', 'twice', 'broken'):
            (workdir / name).mkdir()
        (workdir / 'broken/a.png').write_bytes(b'no image')
        for name in ('dots/a.b.png', 'twice/a.png', 'twice/a.jpg'):
            cv2.imwrite(str(workdir / name), np.zeros((8, 8, 3), np.uint8))
        assert cli.main(['lmdb', *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count('\n') == 1
        assert not (workdir / 'x.lmdb').exists()


class TestCommand:
    def test_version_names_both_packages(self):
        result = subprocess.run([sys.executable, '-m', 'drtl_plugin.cli', '--version'], capture_output=True, text=True)
        assert result.stdout.strip() == f'drtl_plugin {drtl_plugin.__version__} (basicsr 1.4.2)'

    def test_prepare_writes_the_sample_data_where_the_options_look(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert cli.main(['prepare']) == 0
        assert capsys.readouterr().out == f'The sample data is in {SAMPLE_ROOT}.\n'
        opt = yaml.safe_load((OPTIONS / 'drtl_x4.yml').read_text())
        assert all(Path(opt['datasets']['val'][key]).is_dir() for key in ('dataroot_gt', 'dataroot_lq'))

    @pytest.mark.parametrize('command', ['train', 'test', 'prepare', 'lmdb'])
    def test_every_command_has_help(self, command, capsys):
        with pytest.raises(SystemExit) as exit_info:
            cli.main([command, '--help'])
        assert exit_info.value.code == 0
        assert len(capsys.readouterr().out) > 200

    @pytest.mark.parametrize('name', sorted(path.name for path in OPTIONS.glob('*.yml')))
    def test_option_files_say_what_they_do_want_and_take(self, name):
        head = (OPTIONS / name).read_text().split('\n\n')[0]
        assert all(line.startswith('#') for line in head.splitlines())
        assert '# Data: ' in head and '# Time: ' in head


@pytest.mark.slow
def test_real_photographs_train_and_adapt(workdir, quick_opt, write_opt, real_data, capsys):
    """The shipped options on a real camera: only the folders change."""
    camera = real_data / 'city100_nikon'
    quick_opt['datasets']['train']['dataroot_gt'] = str(real_data / 'bsds500_train')
    quick_opt['datasets']['train']['target'].update(
        dataroot_gt=str(camera / 'support/hr'), dataroot_lq=str(camera / 'support/lr_x4')
    )
    quick_opt['datasets']['val'].update(dataroot_gt=str(camera / 'val/hr'), dataroot_lq=str(camera / 'val/lr_x4'))
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
    bicubic = float(capsys.readouterr().out.splitlines()[-3].split()[-2])
    assert 25 < bicubic < 30


@pytest.fixture
def adapt_opt(quick_opt) -> dict:
    """The shipped adapt_x4.yml, cut down to seconds, for the network that ``quick_opt`` trains."""
    opt = yaml.safe_load((OPTIONS / 'adapt_x4.yml').read_text(encoding='utf-8'))
    opt['datasets']['train'].update(
        {key: quick_opt['datasets']['train'][key] for key in ('gt_size', 'distortions', 'num_worker_per_gpu')}
    )
    opt['network_g'] = quick_opt['network_g']
    opt['drtl'] = {'weighting': {'effective_tasks': 2}, 'adapt': quick_opt['drtl']['adapt']}
    opt['drtl']['hooks'] = quick_opt['drtl']['hooks']
    opt['train'] = {'pixel_opt': quick_opt['train']['pixel_opt']}
    return opt


class TestAdapt:
    @pytest.mark.slow
    def test_a_trained_network_is_adapted_as_in_training(self, workdir, quick_opt, adapt_opt, write_opt, capsys):
        """Same start, same pairs, same seed: the same weights as training's own adaptation, bit for bit."""
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        trained = capsys.readouterr().out.splitlines()[-3:]
        assert cli.main(['train', '-opt', write_opt(adapt_opt)]) == 0
        assert capsys.readouterr().out.splitlines()[-3:] == trained
        models = workdir / 'experiments/adapt_x4/models'
        assert [path.name for path in models.iterdir()] == ['net_g_adapted_latest.pth']
        paths = (workdir / 'experiments/drtl_x4/models/net_g_adapted_latest.pth', models / 'net_g_adapted_latest.pth')
        first, second = (torch.load(path, weights_only=True)['params'] for path in paths)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert json.loads((models.parent / 'knowledge_graph.json').read_text())['labels']

    def test_its_log_says_what_it_does_in_order(self, workdir, quick_opt, adapt_opt, write_opt):
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        adapt_opt['drtl']['camera_fit'] = False
        assert cli.main(['train', '-opt', write_opt(adapt_opt)]) == 0
        log = next((workdir / 'experiments/adapt_x4').glob('*.log')).read_text()
        lines = (
            'Measuring the relation to the target (transfer).',
            'Measuring the relation to the target (transfer) took ',
            'Adapting to the target (5 pairs, 2 steps).',
            'Adapting to the target (5 pairs, 2 steps) took ',
            'The adapted network is saved in ',
            'Validation sample_camera\n',
            'Validation sample_camera_adapted\n',
        )
        assert sorted(lines, key=log.index) == list(lines)
        assert not re.search('training|latest model', log.partition('Model [DRTLAdaptModel]')[2])
        assert re.findall(r'@ (\d+) iter', log) == ['0'] * 6

    def test_what_it_needs_is_named(self, workdir, quick_opt, adapt_opt, write_opt, capsys):
        cli.main(['train', '-opt', write_opt(quick_opt)])
        path = write_opt(adapt_opt)
        for change, message in (
            ('path:pretrain_network_g=none', 'path.pretrain_network_g is missing'),
            ('datasets:train:target=none', 'datasets.train.target is missing'),
            ('train:total_iter=5', 'train.total_iter: DRTLAdaptModel does not train'),
            ('drtl:inner={rate_lr: 0.1}', 'drtl.inner.rate_lr: DRTLAdaptModel learns no step sizes'),
            ('drtl:adapt:warmup=-1', 'drtl.adapt.warmup: -1 is out of range'),
        ):
            assert cli.main(['train', '-opt', path, '--force_yml', change]) == 2
            lines = capsys.readouterr().err.strip().splitlines()
            assert message in lines[-1]


class TestRelation:
    @pytest.mark.parametrize('relation', ['embedding', 'transfer'])
    @pytest.mark.slow
    def test_prints_a_table_and_writes_the_graph(self, workdir, quick_opt, adapt_opt, write_opt, capsys, relation):
        cli.main(['train', '-opt', write_opt(quick_opt)])
        adapt_opt['drtl']['weighting']['relation'] = relation
        adapt_opt['network_r'] = quick_opt['network_r']
        path = write_opt(adapt_opt)
        capsys.readouterr()
        for _ in range(2):
            assert cli.main(['relation', '-opt', path]) == 0
        lines = capsys.readouterr().out.splitlines()[-7:]
        folder = workdir / 'results/adapt_x4_relation'
        content = json.loads((folder / 'knowledge_graph.json').read_text())
        weights = [float(re.fullmatch(r'  .+  [+-]\d\.\d\d  x(\d\.\d\d)  #*', line)[1]) for line in lines[:5]]
        assert weights == sorted(weights, reverse=True)
        assert lines[0].split('  ')[1] == 'camera fit'
        assert weights == pytest.approx(sorted(content['weights'], reverse=True), abs=0.006)
        assert lines[6] == f'The knowledge graph is in {folder.relative_to(workdir)}.'
        assert cv2.imread(str(folder / 'knowledge_graph.png')) is not None
        # The first measurement is kept.
        assert len(list((workdir / 'results').glob('adapt_x4_relation_archived_*'))) == 1
        assert not (workdir / 'experiments/adapt_x4').exists()

    def test_what_it_needs_is_named(self, workdir, quick_opt, write_opt, capsys):
        path = write_opt(quick_opt)
        for changes, message in (
            (['drtl:weighting:relation=uniform'], "'uniform' measures nothing"),
            (['drtl:weighting:relation=transfer', 'train:total_iter=9'], "relation 'transfer' needs a trained network"),
            (['datasets:train:target=none'], 'datasets.train.target is missing'),
        ):
            assert cli.main(['relation', '-opt', path, '--force_yml', *changes]) == 2
            assert message in capsys.readouterr().err.strip().splitlines()[-1]

    def test_other_models_have_none(self, workdir, plain_opt, write_opt, capsys):
        assert cli.main(['relation', '-opt', write_opt(plain_opt)]) == 2
        assert 'measured by DRTLModel, not by SRModel' in capsys.readouterr().err


def test_relation_weights_and_picture_are_in_tensorboard_at_each_refresh(workdir, quick_opt, write_opt):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    quick_opt['train']['total_iter'] = 5  # interval 2: measured before the first iteration, after 2 and after 4
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
    (path,) = (workdir / 'tb_logger/drtl_x4').glob('events*')  # of several, TensorBoard follows the newest only
    events = EventAccumulator(str(path)).Reload()
    steps = [event.step for event in events.Scalars('weights/bicubic')]
    assert steps == [event.step for event in events.Scalars('relation/bicubic')]
    pictures = len(events.Images('knowledge_graph'))
    assert sorted(steps) == [0, 2, 4]
    assert pictures == 3
