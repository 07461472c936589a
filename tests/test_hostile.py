"""Files from strangers: what they hold does not run, and nothing is written where they say."""

import ast
import os
import pickle
from pathlib import Path

import pytest
import torch

import drtl_plugin
from drtl_plugin import cli
from drtl_plugin.sources.sample import SAMPLE_ROOT


class Bomb:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ('exploded',)


@pytest.fixture(params=['in a zip', 'a pickle'])
def bomb(workdir, request) -> str:
    content = {'params': {'conv_first.weight': torch.zeros(1)}, 'bomb': Bomb(), 'iter': 1}
    if request.param == 'in a zip':
        torch.save(content, 'bomb.pth')
    else:
        (workdir / 'bomb.pth').write_bytes(pickle.dumps(content))
    return 'bomb.pth'


@pytest.mark.parametrize(
    'key', ['pretrain_network_g', 'pretrain_network_r', 'pretrain_camera_fit', 'pretrain_inner_rates', 'resume_state']
)
def test_checkpoints_run_no_code(workdir, quick_opt, write_opt, capsys, bomb, key):
    quick_opt['path'][key] = bomb
    quick_opt['drtl']['camera_fit'] = key == 'pretrain_camera_fit'
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith('basicsr: error: ')]
    assert len(errors) == 1
    assert 'bomb.pth' in errors[0]
    assert not (workdir / 'exploded').exists()


@pytest.mark.parametrize('name', ['params', 'net'])
def test_weights_of_a_network_under_test_run_no_code(workdir, quick_opt, write_opt, bomb, name):
    opt = {key: quick_opt[key] for key in ('scale', 'num_gpu', 'network_g')}
    opt.update(
        name='t', model_type='SRModel', datasets={'test_1': quick_opt['datasets']['val']}, val={'save_img': False}
    )
    opt['path'] = {'pretrain_network_g': bomb, 'param_key_g': name}
    assert cli.main(['test', '-opt', write_opt(opt)]) == 2
    assert not (workdir / 'exploded').exists()


@pytest.mark.parametrize(
    'text', ['!!python/object/apply:os.mkdir [exploded]', '!!python/name:os.mkdir', '!!python/module:os']
)
def test_option_files_run_no_code(workdir, capsys, text):
    Path('evil.yml').write_text(f'name: {text}\n')
    assert cli.main(['train', '-opt', 'evil.yml']) == 2
    assert 'evil.yml: not a valid option file' in capsys.readouterr().err
    assert not (workdir / 'exploded').exists()


@pytest.mark.parametrize('name', ['../x', '/tmp/x', 'a/b', '..', '.', '', 'a\nb', 'a\0b'])
@pytest.mark.parametrize('keys', [['name'], ['datasets', 'val', 'name']])
def test_names_are_no_paths(workdir, quick_opt, write_opt, capsys, name, keys):
    section = quick_opt
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = name
    before = set(workdir.parent.rglob('*'))
    path = write_opt(quick_opt)
    assert cli.main(['train', '-opt', path]) == 2
    assert f'{".".join(keys)}: expected the name of a folder' in capsys.readouterr().err
    assert set(workdir.parent.rglob('*')) - before == {Path(path)}


def test_nothing_is_evaluated_and_no_shell_started():
    """In the whole package."""
    for path in Path(drtl_plugin.__file__).parent.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ('eval', 'exec', 'os.system', 'os.popen', 'pickle.load', 'pickle.loads'), path
                assert not any(keyword.arg == 'shell' for keyword in node.keywords), path
                if name == 'torch.load':
                    assert any(keyword.arg == 'weights_only' and keyword.value.value for keyword in node.keywords), path
                if name == 'yaml.load':
                    assert ast.unparse(node.args[1]) == 'OptionLoader', path


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='there is no folder that nobody can write')
def test_a_folder_that_nobody_can_write_is_named(workdir, quick_opt, write_opt, capsys, monkeypatch):
    path, sample = write_opt(quick_opt), workdir / SAMPLE_ROOT
    text = Path(path).read_text().replace(SAMPLE_ROOT, str(sample))
    Path(path).write_text(text)
    monkeypatch.chdir('/proc')
    assert cli.main(['train', '-opt', path]) == 2
    error = capsys.readouterr().err
    assert 'basicsr: error: experiments: cannot be written' in error
    assert error.strip().count('\n') == 0
