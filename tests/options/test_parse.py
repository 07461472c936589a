"""``parse_options`` against BasicSR's own, and the checks that it adds."""

import argparse
import dataclasses

import pytest
import torch
from basicsr.utils import options as basicsr_options
from basicsr.utils.registry import DATASET_REGISTRY

from drtl_plugin.errors import OptionError
from drtl_plugin.options.basicsr import LoggerOptions, TrainOptions, ValOptions
from drtl_plugin.options.convert import Section, declared, default
from drtl_plugin.options.file import load_option_file
from drtl_plugin.options.parse import check_options, parse_options
from drtl_plugin.options.sections import TaskDatasetOptions
from tests.conftest import OPTIONS


def arguments(path: str, **overrides) -> argparse.Namespace:
    values = {'opt': path, 'launcher': 'none', 'auto_resume': False, 'debug': False, 'force_yml': None, **overrides}
    return argparse.Namespace(**values)


class TestParseOptions:
    @pytest.mark.parametrize('debug', [False, True])
    @pytest.mark.parametrize('path', sorted(OPTIONS.glob('*.yml')), ids=lambda path: path.name)
    def test_result_is_that_of_basicsr(self, workdir, monkeypatch, path, debug):
        is_train, adapts = 'test' not in path.name, 'adapt' in path.name
        ours = parse_options(arguments(str(path), debug=debug), str(workdir), is_train)
        monkeypatch.setattr('sys.argv', ['train.py', '-opt', str(path)] + ['--debug'] * debug)
        if adapts and debug:  # BasicSR's parser would look up the logger section
            return
        theirs, _ = basicsr_options.parse_options(str(workdir), is_train)
        if is_train:
            ours_train, theirs_train = ours['datasets'].pop('train'), theirs['datasets'].pop('train')
            assert theirs_train.items() <= ours_train.items()  # completed by defaults
            assert ours_train['seed'] == theirs['manual_seed']
            assert ours_train['num_episodes'] == default(TaskDatasetOptions, 'num_episodes')
        if adapts:  # completed by a schedule without iterations
            for section in (ours['train'], ours['val'], ours.pop('logger')):
                for key in ('total_iter', 'optim_g', 'scheduler', 'val_freq', 'save_img'):
                    section.pop(key, None)
        assert ours == theirs
        assert list(ours['path']) == list(theirs['path'])

    @pytest.mark.parametrize('path', sorted(OPTIONS.glob('drtl_*.yml')), ids=lambda path: path.name)
    def test_shipped_training_files_have_all_keys_that_basicsr_looks_up(self, path):
        opt = load_option_file(str(path))
        assert {'batch_size_per_gpu', 'num_worker_per_gpu'} <= set(opt['datasets']['train'])
        for name, cls in (('train', TrainOptions), ('val', ValOptions), ('logger', LoggerOptions)):
            assert {field.name for field in declared(cls).values() if field.required} <= set(opt[name])

    @pytest.mark.parametrize('manual_seed', [7, None])
    def test_random_numbers_are_seeded(self, workdir, quick_opt, write_opt, manual_seed):
        quick_opt['manual_seed'] = manual_seed
        opt = parse_options(arguments(write_opt(quick_opt)), str(workdir), is_train=True)
        drawn = torch.rand(2)
        torch.manual_seed(opt['manual_seed'])
        assert drawn.equal(torch.rand(2))
        assert manual_seed is None or opt['manual_seed'] == manual_seed
        assert opt['datasets']['train']['seed'] == opt['manual_seed']

    def test_a_dataset_declares_its_options_by_a_class_of_its_own(self, workdir, quick_opt, write_opt, monkeypatch):
        class OwnOptions(Section):
            name: str
            type: str
            phase: str
            scale: int
            num_worker_per_gpu: int = 3

        kind = type('OwnDataset', (), {'options_class': OwnOptions})
        monkeypatch.setattr(DATASET_REGISTRY, '_obj_map', {**DATASET_REGISTRY._obj_map, 'OwnDataset': kind})
        quick_opt['datasets']['train'] = {'name': 'own', 'type': 'OwnDataset'}
        opt = parse_options(arguments(write_opt(quick_opt)), str(workdir), is_train=True)
        assert opt['datasets']['train']['num_worker_per_gpu'] == 3
        quick_opt['datasets']['train']['num_workers_per_gpu'] = 2
        with pytest.raises(OptionError, match=r"unknown key 'num_workers_per_gpu'; did you mean 'num_w"):
            parse_options(arguments(write_opt(quick_opt)), str(workdir), is_train=True)

    def test_options_of_a_dataset_that_are_no_section_are_refused(self, workdir, quick_opt, write_opt, monkeypatch):
        own_options = dataclasses.make_dataclass('OwnOptions', ['name', 'type'])
        kind = type('OwnDataset', (), {'options_class': own_options})
        monkeypatch.setattr(DATASET_REGISTRY, '_obj_map', {**DATASET_REGISTRY._obj_map, 'OwnDataset': kind})
        quick_opt['datasets']['train'] = {'name': 'own', 'type': 'OwnDataset'}
        with pytest.raises(OptionError, match=r'train\.type: options_class of OwnDataset must derive from .*Section'):
            parse_options(arguments(write_opt(quick_opt)), str(workdir), is_train=True)

    def test_gpu_option_files_run_without_gpu(self, workdir, quick_opt, write_opt, monkeypatch, capsys):
        monkeypatch.setattr('torch.cuda.is_available', lambda: False)
        quick_opt['num_gpu'] = 8
        quick_opt['datasets']['train']['prefetch_mode'] = 'cuda'
        opt = parse_options(arguments(write_opt(quick_opt)), str(workdir), is_train=True)
        assert opt['num_gpu'] == 0
        assert opt['datasets']['train']['prefetch_mode'] == 'cpu'
        assert 'num_gpu 8 becomes 0' in capsys.readouterr().err

    @pytest.mark.parametrize('key', ['name', 'datasets', 'train', 'logger'])
    def test_missing_sections_are_named(self, workdir, quick_opt, write_opt, key):
        del quick_opt[key]
        with pytest.raises(OptionError, match=f"the key '{key}' is missing"):
            parse_options(arguments(write_opt(quick_opt)), str(workdir), is_train=True)

    def test_sections_must_be_mappings(self, workdir, quick_opt, write_opt):
        quick_opt['train'] = 'fast'
        with pytest.raises(OptionError, match="train: expected a section of keys and values, got 'fast'"):
            parse_options(arguments(write_opt(quick_opt)), str(workdir), is_train=True)

    def test_several_gpus_are_not_taken_for_a_larger_batch(self, workdir, quick_opt, write_opt, monkeypatch, capsys):
        monkeypatch.setattr('torch.cuda.is_available', lambda: True)
        monkeypatch.setattr('torch.cuda.device_count', lambda: 4)
        opt = parse_options(arguments(write_opt(quick_opt)), str(workdir), is_train=True)
        assert opt['num_gpu'] == 1
        assert 'num_gpu 4 becomes 1' in capsys.readouterr().err

    def test_home_is_expanded_in_the_target_too(self, workdir, quick_opt, write_opt, monkeypatch):
        monkeypatch.setenv('HOME', '/home/someone')
        quick_opt['datasets']['train']['target']['dataroot_lq'] = '~/pairs'
        opt = parse_options(arguments(write_opt(quick_opt)), str(workdir), is_train=True)
        assert opt['datasets']['train']['target']['dataroot_lq'] == '/home/someone/pairs'

    def test_home_is_expanded_in_all_paths(self, workdir, quick_opt, write_opt, monkeypatch):
        monkeypatch.setenv('HOME', '/home/someone')
        keys = [f'pretrain_{name}' for name in ('network_g', 'network_r', 'camera_fit', 'inner_rates')]
        quick_opt['path'] = dict.fromkeys([*keys, 'resume_state'], '~/a.pth')
        quick_opt['datasets']['train']['meta_info_file'] = '~/list.txt'
        quick_opt['datasets']['train']['target']['meta_info_file'] = '~/list.txt'
        opt = parse_options(arguments(write_opt(quick_opt)), str(workdir), is_train=True)
        assert {opt['path'][key] for key in quick_opt['path']} == {'/home/someone/a.pth'}
        train = opt['datasets']['train']
        assert train['meta_info_file'] == train['target']['meta_info_file'] == '/home/someone/list.txt'

    def test_suffix_is_wanted_only_for_images(self, workdir, write_opt):
        opt = {'name': 'n', 'model_type': 'm', 'num_gpu': 0, 'datasets': {}, 'path': {}, 'val': {'save_img': False}}
        assert parse_options(arguments(write_opt(opt)), str(workdir), is_train=False)['name'] == 'n'
        opt['val']['save_img'] = True
        with pytest.raises(OptionError, match=r'val\.suffix is missing'):
            parse_options(arguments(write_opt(opt)), str(workdir), is_train=False)


@pytest.mark.parametrize('model_type', ['DRTLModel', 'SRModel'])
def test_keys_that_the_run_sets_may_be_in_the_file_and_are_ignored(workdir, quick_opt, write_opt, model_type):
    computed = {'dist': True, 'rank': 3, 'world_size': 4, 'auto_resume': True, 'is_train': False, 'root_path': 'x'}
    quick_opt.update(computed, model_type=model_type)
    keys = ('experiments_root', 'models', 'training_states', 'log', 'visualization', 'results_root')
    quick_opt['path'].update(dict.fromkeys(keys, 'x'))
    opt = parse_options(arguments(write_opt(quick_opt)), str(workdir), is_train=True)
    assert [opt[key] for key in computed if key != 'root_path'] == [False, 0, 1, False, True]
    assert 'x' not in [opt['path'][key] for key in keys[:-1]]
    quick_opt['train']['models'] = 'x'
    if model_type == 'DRTLModel':
        with pytest.raises(OptionError, match="train: unknown key 'models'"):
            check_options(quick_opt, 'opt.yml', is_train=True)


class TestKeysOfOtherModels:
    """Other models may read keys of their own: only a misspelt declared key is an error."""

    @pytest.fixture
    def plain_opt(self, quick_opt) -> dict:
        opt = {key: value for key, value in quick_opt.items() if key not in ('drtl', 'network_r')}
        return {**opt, 'model_type': 'SRGANModel', 'num_gpu': 0}

    @pytest.mark.parametrize(
        ('section', 'key', 'message'),
        [
            ('train', 'ema_decy', "train: unknown key 'ema_decy'; did you mean 'ema_decay'?"),
            ('train', 'warmup_iters', "train: unknown key 'warmup_iters'; did you mean 'warmup_iter'?"),
            ('val', 'metric', "val: unknown key 'metric'; did you mean 'metrics'?"),
            ('', 'manual_sed', "option file: unknown key 'manual_sed'; did you mean 'manual_seed'?"),
        ],
    )
    def test_misspelt_keys_are_named(self, plain_opt, section, key, message):
        (plain_opt[section] if section else plain_opt)[key] = {}
        with pytest.raises(OptionError) as error:
            check_options(plain_opt, 'opt.yml', is_train=True)
        assert str(error.value) == message

    def test_misspelt_keys_of_basicsrs_datasets_are_named(self, plain_opt):
        plain_opt['datasets']['val']['use_flip'] = True
        with pytest.raises(OptionError, match=r"datasets\.val: unknown key 'use_flip'; did you mean 'use_hflip'\?"):
            check_options(plain_opt, 'opt.yml', is_train=True)

    @pytest.mark.parametrize(
        ('section', 'key'),
        [
            ('train', 'optim_d'),  # declared, and read by SRGANModel
            ('train', 'my_models_own'),
            ('train', 'pixel_opt_2'),
            ('train', 'optim_e'),
            ('path', 'pretrain_network_e'),
            ('path', 'strict_load_e'),
            ('', 'network_d2'),
            ('', 'queue_size'),
        ],
    )
    def test_other_keys_are_left_to_the_model(self, plain_opt, section, key):
        (plain_opt[section] if section else plain_opt)[key] = None if 'pretrain' in key else {}
        check_options(plain_opt, 'opt.yml', is_train=True)

    @pytest.mark.parametrize('key', ['use_shuffle', 'task'])  # in option files of BasicSR and of others
    def test_other_keys_of_basicsrs_datasets_are_ignored(self, plain_opt, key):
        plain_opt['datasets']['val'][key] = True
        check_options(plain_opt, 'opt.yml', is_train=True)
