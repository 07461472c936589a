"""What is declared, built and installed: dependencies, option files, the wheel."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

import drtl_plugin
from drtl_plugin import cli
from drtl_plugin.sources.sample import prepare_sample_data
from tests.conftest import OPTIONS

ROOT = OPTIONS.parent
# Imported only where a user asks for them, with a message that names the package.
OPTIONAL = {'onnx', 'onnxruntime', 'onnxscript', 'pyiqa', 'spandrel_extra_arches', 'wandb'}


def imported_packages() -> set[str]:
    """Top-level packages that drtl_plugin imports, the standard library and itself left out."""
    names = set()
    for path in (ROOT / 'drtl_plugin').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition('.')[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition('.')[0])
    return names - set(sys.stdlib_module_names) - {'drtl_plugin'}


def declared() -> set[str]:
    """Distributions in ``install_requires``."""
    text = (ROOT / 'setup.py').read_text(encoding='utf-8')
    block = re.search(r'install_requires=\[(.*?)\n    \]', text, re.DOTALL)[1]
    return {re.match(r'[\w-]+', name)[0].lower() for _, name in re.findall(r"""(['"])(.+?)\1,""", block)}


def test_every_imported_package_is_declared():
    # packages_distributions() of Python 3.10 does not read the lists of files.
    distributions: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            distributions.setdefault(file.parts[0].removesuffix('.py'), []).append(distribution.metadata['Name'])
    missing = {
        name
        for name in imported_packages() - OPTIONAL
        if not {distribution.lower() for distribution in distributions.get(name, [name])} & declared()
    }
    assert missing == set()


def test_tensorboard_starts(tmp_path):
    """The program itself, as the README says it: it answers on its port."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / 'tensorboard', '--logdir', tmp_path, '--port', str(port)]
    log = tmp_path / 'stderr.txt'
    with open(log, 'w') as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, start_new_session=True)
    try:
        page = ''
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                page = urllib.request.urlopen(f'http://127.0.0.1:{port}/').read().decode()
                break
            time.sleep(0.25)
        assert '<title>TensorBoard</title>' in page, log.read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_init_writes_the_shipped_option_files(tmp_path, capsys):
    assert cli.main(['init', str(tmp_path / 'my project')]) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / 'my project' / 'options').iterdir()}
    assert written == {path.name: path.read_bytes() for path in OPTIONS.iterdir()}
    assert f"  cd '{tmp_path}/my project'\n  basicsr train -opt options/drtl_x4.yml\n" in capsys.readouterr().out


def test_init_overwrites_nothing(tmp_path, capsys):
    (tmp_path / 'options').mkdir()
    mine = tmp_path / 'options' / 'drtl_x4.yml'
    mine.write_text('mine')
    assert cli.main(['init', str(tmp_path)]) == 2
    assert f'{mine} already exists' in capsys.readouterr().err
    assert [path.name for path in (tmp_path / 'options').iterdir()] == ['drtl_x4.yml']
    assert mine.read_text() == 'mine'


def test_the_changelog_begins_with_this_version():
    text = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(r'^## (\S+)', text, re.MULTILINE)[1] == drtl_plugin.__version__


@pytest.mark.wheel
def test_the_wheel_does_the_main_job_in_a_clean_environment(tmp_path):
    """Built, checked, installed as a user would, and trained with, cut short."""
    dist = tmp_path / 'dist'
    subprocess.run([sys.executable, '-m', 'build', '--outdir', dist, ROOT], check=True)
    (wheel,), (source,) = dist.glob('*.whl'), dist.glob('*.tar.gz')
    subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', wheel, source], check=True)
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {f'drtl_plugin/shipped_options/{path.name}' for path in OPTIONS.iterdir()}
    assert shipped <= set(names) and 'drtl_plugin/py.typed' in names
    assert {name.partition('/')[0].partition('-')[0] for name in names} == {'drtl_plugin'}

    environment = tmp_path / 'environment'
    venv.create(environment, with_pip=True)
    variables = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'PYTHONHOME')}
    constraints = str(ROOT / 'constraints.txt')
    variables.update(PIP_CONSTRAINT=constraints, PIP_BUILD_CONSTRAINT=constraints)

    def call(program: str, *arguments: object, folder: Path = tmp_path) -> subprocess.CompletedProcess:
        command = [environment / 'bin' / program, *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=variables, text=True, capture_output=True)

    assert call('python', '-m', 'pip', 'install', '--upgrade', 'pip').returncode == 0
    # Without its dependencies, the package has the command that installs those which pip gets wrong.
    for arguments in (
        ('pip', 'install', '--no-deps', wheel),
        ('drtl_plugin.install',),
        ('pip', 'install', wheel),
    ):
        result = call('python', '-m', *arguments)
        assert result.returncode == 0, result.stderr[-2000:]
    project = tmp_path / 'project'
    assert call('basicsr', 'init', project).returncode == 0
    prepare_sample_data(project / 'datasets' / 'drtl_sample')
    settings = ('train:total_iter=4', 'val:val_freq=4', 'drtl:adapt:steps=2', 'train:scheduler:periods=[4]')
    hooks = 'drtl:hooks=[{type: RelationHook, interval: 2, num_patches: 4, transfer_steps: 1}]'
    result = call('basicsr', 'train', '-opt', 'options/drtl_x4.yml', '--force_yml', *settings, hooks, folder=project)
    assert result.returncode == 0, result.stderr[-2000:]
    assert 'after adaptation' in result.stdout
    weights, photographs = 'experiments/drtl_x4/models/net_g_adapted_latest.pth', 'datasets/drtl_sample/camera/val/lq'
    result = call('basicsr', 'upscale', '-i', photographs, '-o', 'restored', '--weights', weights, folder=project)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(list((project / 'restored').iterdir())) == 3
