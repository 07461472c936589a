import argparse

import pytest

from drtl_plugin.errors import OptionError
from drtl_plugin.options.parse import (
    DRTLOptions,
    TargetOptions,
    TaskDatasetOptions,
    force_yml,
    load_option_file,
    parse_options,
    parse_section,
)


def arguments(path: str, **overrides) -> argparse.Namespace:
    values = {'opt': path, 'launcher': 'none', 'auto_resume': False, 'debug': False, 'force_yml': None, **overrides}
    return argparse.Namespace(**values)


def test_defaults_without_a_drtl_section():
    options = DRTLOptions.from_opt({})
    assert options.pipeline == 'meta'
    assert options.weighting.relation == 'transfer'
    assert options.hooks == []


def test_numbers_in_exponent_notation_are_numbers():
    # YAML 1.1 reads 1e-4 as a string.
    assert DRTLOptions.from_opt({'drtl': {'adapt': {'lr': '1e-4', 'steps': '20'}}}).adapt.lr == 1e-4


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        ({'pipelin': 'meta'}, r"drtl: unknown key 'pipelin'; did you mean 'pipeline'\?"),
        ({'inner': {'step': 1}}, r"drtl\.inner: unknown key 'step'; did you mean 'steps'\?"),
        ({'pipeline': 'both'}, r"drtl\.pipeline: 'both' is not one of pretrain, meta"),
        ({'inner': {'steps': 0}}, r'drtl\.inner\.steps: 0 is out of range; it must be at least 1'),
        ({'inner': {'steps': 1.5}}, r'drtl\.inner\.steps: expected a whole number, got 1\.5'),
        ({'inner': {'lr': True}}, r'drtl\.inner\.lr: expected a number, got True'),
        ({'inner': {'lr': 'fast'}}, r"drtl\.inner\.lr: expected a number, got 'fast'"),
        ({'weighting': {'floor': 2}}, r'drtl\.weighting\.floor: 2 is out of range; it must be between 0 and 1'),
        ({'weighting': 'uniform'}, r"drtl\.weighting: expected a section of keys and values, got 'uniform'"),
        ({'hooks': {'type': 'RelationHook'}}, r'drtl\.hooks: expected a list'),
        ({'hooks': ['RelationHook']}, r"drtl\.hooks\[0\]: expected dict, got 'RelationHook'"),
        ({'xyz': 1}, r"drtl: unknown key 'xyz'; known: adapt, camera_fit, hooks, inner, pipeline"),
    ],
)
def test_wrong_sections_are_named(section, message):
    with pytest.raises(OptionError, match=message):
        DRTLOptions.from_opt({'drtl': section})


def test_missing_key_says_what_it_is_for():
    with pytest.raises(OptionError, match=r'target\.dataroot_lq is missing: Folder or \.lmdb of LQ images'):
        parse_section(TargetOptions, {'dataroot_gt': 'x'}, 'target')


def test_nested_sections_are_objects():
    section = {'name': 'n', 'type': 't', 'dataroot_gt': 'x', 'target': {'dataroot_gt': 'a', 'dataroot_lq': 'b'}}
    assert parse_section(TaskDatasetOptions, section, 'train').target.num_shot == 5
    assert parse_section(TaskDatasetOptions, {**section, 'target': None}, 'train').target is None


class TestLoadOptionFile:
    def test_tags_run_no_code(self, tmp_path):
        path = tmp_path / 'bomb.yml'
        path.write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'exploded'}']")
        with pytest.raises(OptionError, match='not a valid option file'):
            load_option_file(str(path))
        assert not (tmp_path / 'exploded').exists()

    @pytest.mark.parametrize('text', ['- a list', 'a: [1', ''])
    def test_other_content_is_refused_in_one_line(self, tmp_path, text):
        path = tmp_path / 'wrong.yml'
        path.write_text(text)
        with pytest.raises(OptionError) as error:
            load_option_file(str(path))
        assert str(path) in str(error.value)
        assert '\n' not in str(error.value)

    def test_missing_file(self):
        with pytest.raises(OptionError, match=r'nowhere\.yml: cannot read the option file \(No such file'):
            load_option_file('nowhere.yml')


class TestForceYml:
    @pytest.mark.parametrize(
        ('entry', 'value'),
        [
            ('a:b=3', 3),
            ('a:b=0.5', 0.5),
            ('a:b=!!float 1e-3', 1e-3),
            ('a:b=1e-3', 1e-3),
            ('a:b=[1, 2]', [1, 2]),
            ('a:b=true', True),
            ('a:b=none', None),
            ('a:b=~', None),
            ('a:b=x=y', 'x=y'),
            ('a:new=word', 'word'),
        ],
    )
    def test_values_are_yaml(self, entry, value):
        opt = {'a': {'b': 1}}
        force_yml(opt, [entry])
        assert opt['a'][entry.partition('=')[0].split(':')[1]] == value

    def test_numbers_index_lists(self):
        opt = {'hooks': [{'interval': 1}]}
        force_yml(opt, ['hooks:0:interval=7'])
        assert opt == {'hooks': [{'interval': 7}]}

    @pytest.mark.parametrize('entry', ['a:b', 'a::b=1', '=1', 'z:b=1', 'a:b:c=1', 'a:b=[1'])
    def test_wrong_entries_are_named(self, entry):
        opt = {'a': {'b': 1}}
        with pytest.raises(OptionError, match='--force_yml'):
            force_yml(opt, [entry])
        assert opt == {'a': {'b': 1}}

    def test_nothing_is_evaluated(self, tmp_path):
        opt = {'a': {'b': 1}}
        force_yml(opt, [f'a:b=[__import__("os").mkdir("{tmp_path}/exploded")]'])
        with pytest.raises(OptionError):
            force_yml(opt, [f'a:x"];__import__("os").mkdir("{tmp_path}/exploded")#:b=1'])
        assert not (tmp_path / 'exploded').exists()


class TestParseOptions:
    def test_is_basicsrs_result(self, workdir, quick_opt, write_opt, monkeypatch):
        from basicsr.utils import options as basicsr_options

        path = write_opt({**quick_opt, 'num_gpu': 0})
        ours = parse_options(arguments(path), str(workdir), is_train=True)
        monkeypatch.setattr('sys.argv', ['train.py', '-opt', path])
        theirs, _ = basicsr_options.parse_options(str(workdir), is_train=True)
        ours_train, theirs_train = ours['datasets'].pop('train'), theirs['datasets'].pop('train')
        assert ours == theirs
        assert theirs_train.items() <= ours_train.items()  # completed by defaults
        assert ours_train['seed'] == theirs['manual_seed']
        assert ours_train['num_episodes'] == TaskDatasetOptions.num_episodes

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


@pytest.mark.parametrize(
    ('text', 'value'),
    [('1e-4', 1e-4), ('2E3', 2000.0), ('-.5e+1', -5.0), ('1_e3', '1_e3'), ("'1e-4'", '1e-4'), ('e5', 'e5')],
)
def test_exponents_are_numbers_without_a_tag(tmp_path, text, value):
    (tmp_path / 'a.yml').write_text(f'key: {text}')
    assert load_option_file(str(tmp_path / 'a.yml')) == {'key': value}
