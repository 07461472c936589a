"""Option files are read without running code, and ``--force_yml`` changes single values."""

import pytest

from drtl_plugin.errors import OptionError
from drtl_plugin.options.file import force_yml, load_option_file


@pytest.mark.parametrize(
    ('text', 'value'),
    [('1e-4', 1e-4), ('2E3', 2000.0), ('-.5e+1', -5.0), ('1_e3', '1_e3'), ("'1e-4'", '1e-4'), ('e5', 'e5')],
)
def test_exponents_are_numbers_without_a_tag(tmp_path, text, value):
    (tmp_path / 'a.yml').write_text(f'key: {text}')
    assert load_option_file(str(tmp_path / 'a.yml')) == {'key': value}


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
