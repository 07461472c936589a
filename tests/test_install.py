"""The installer, with the real pip in fresh environments, against package indexes on this machine."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import venv
import zipfile
from pathlib import Path

import pytest

from drtl_plugin import install

ROOT = Path(install.__file__).parents[1]
SCRIPT = install.__file__
# A port of this machine that nothing listens on.
UNREACHABLE = 'http://127.0.0.1:9'


def write_wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """An empty package, in a folder of the simple index."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    info = f'{name}-{version}.dist-info'
    with zipfile.ZipFile(folder / name / f'{name}-{version}-py3-none-any.whl', 'w') as wheel:
        wheel.writestr(f'{name}/__init__.py', f'__version__ = {version!r}\n')
        needs = '\n'.join(f'Requires-Dist: {requirement}' for requirement in requires)
        wheel.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}\n')
        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        wheel.writestr(f'{info}/RECORD', '')


@pytest.fixture
def serve():
    """Serve folders over HTTP; gives their URLs."""
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(QuietHandler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{server.server_port}'

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def environment(tmp_path):
    """A fresh environment that has nothing but pip and an empty basicsr; gives its interpreter."""
    folder = tmp_path / 'environment'
    venv.create(folder)
    (site_packages,) = folder.glob('lib/python*/site-packages')
    (site_packages / 'pip').symlink_to(importlib.util.find_spec('pip').submodule_search_locations[0])
    write_wheel(tmp_path, 'basicsr', '1.4.2')
    with zipfile.ZipFile(tmp_path / 'basicsr' / 'basicsr-1.4.2-py3-none-any.whl') as wheel:
        wheel.extractall(site_packages)
    return folder / 'bin' / 'python'


@pytest.fixture
def run(tmp_path, environment, serve):
    """Run the installer; the default index has CUDA builds, the CPU index those for CPUs."""
    for folder, build in (('default', 'cu126'), ('cpu', 'cpu')):
        for torch, torchvision in (('2.6.0', '0.21.0'), ('2.7.0', '0.22.0')):
            write_wheel(tmp_path / folder, 'torch', f'{torch}+{build}')
            write_wheel(tmp_path / folder, 'torchvision', f'{torchvision}+{build}', f'torch=={torch}')
    urls = {'default': serve(tmp_path / 'default'), 'cpu': serve(tmp_path / 'cpu')}

    def run_installer(cpu_index: str = urls['cpu'], path: str = '') -> tuple[subprocess.CompletedProcess, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith('PIP_')}
        variables = {'PIP_CONFIG_FILE': os.devnull, 'PIP_INDEX_URL': urls['default'], 'PIP_NO_CACHE_DIR': '1'}
        result = subprocess.run(
            [environment, SCRIPT, '--cpu-index', cpu_index],
            capture_output=True,
            text=True,
            env={**clean, **variables, 'PATH': f'{path}{os.pathsep}/usr/bin:/bin'},
        )
        script = 'import torch, torchvision; print(torch.__version__, torchvision.__version__)'
        return result, subprocess.run([environment, '-c', script], capture_output=True, text=True).stdout.strip()

    return run_installer


def fake_driver(folder: Path, script: str) -> str:
    folder.mkdir()
    command = folder / 'nvidia-smi'
    command.write_text(f'#!/bin/sh\n{script}\n')
    command.chmod(0o755)
    return str(folder)


def test_without_a_driver_the_cpu_builds_are_installed(run):
    result, versions = run()
    assert (result.returncode, versions) == (0, '2.7.0+cpu 0.22.0+cpu'), result.stderr
    assert 'no NVIDIA GPU found' in result.stdout


def test_where_the_cpu_index_is_unreachable_the_default_one_is_used(run):
    result, versions = run(cpu_index=UNREACHABLE)
    assert (result.returncode, versions) == (0, '2.7.0+cu126 0.22.0+cu126'), result.stderr
    assert 'that failed (ERROR: No matching distribution found for torch' in result.stdout
    assert result.stderr == ''


def test_with_a_driver_the_default_index_is_used(run, tmp_path):
    result, versions = run(path=fake_driver(tmp_path / 'bin', 'echo "GPU 0: NVIDIA H100 (UUID: GPU-0)"'))
    assert (result.returncode, versions) == (0, '2.7.0+cu126 0.22.0+cu126'), result.stderr
    assert 'CPU' not in result.stdout


@pytest.mark.parametrize('script', ['exit 9', 'echo "No devices found."'])
def test_a_driver_without_a_gpu_is_none(run, tmp_path, script):
    result, versions = run(path=fake_driver(tmp_path / 'bin', script))
    assert versions == '2.7.0+cpu 0.22.0+cpu', result.stderr


def test_an_installed_torch_is_left_alone(run):
    run()
    result, versions = run(cpu_index=UNREACHABLE)
    assert (result.returncode, versions, result.stdout) == (0, '2.7.0+cpu 0.22.0+cpu', '')


def test_torchvision_is_the_release_of_an_installed_torch(run, environment):
    run()
    (site_packages,) = Path(environment).parents[1].glob('lib/python*/site-packages')
    for path in site_packages.glob('torch*'):
        shutil.rmtree(path)
    write_wheel(site_packages.parent, 'torch', '2.6.0+cpu')
    with zipfile.ZipFile(site_packages.parent / 'torch' / 'torch-2.6.0+cpu-py3-none-any.whl') as wheel:
        wheel.extractall(site_packages)
    result, versions = run()
    assert (result.returncode, versions) == (0, '2.6.0+cpu 0.21.0+cpu'), result.stderr


def test_a_torch_that_is_too_old_is_named(run, environment):
    (site_packages,) = Path(environment).parents[1].glob('lib/python*/site-packages')
    write_wheel(site_packages.parent, 'torch', '2.5.1')
    with zipfile.ZipFile(site_packages.parent / 'torch' / 'torch-2.5.1-py3-none-any.whl') as wheel:
        wheel.extractall(site_packages)
    result, _ = run()
    assert result.returncode == 2 and 'torch 2.5.1 is too old' in result.stderr


def test_python_that_is_too_old_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(install, 'OLDEST_PYTHON', (sys.version_info.major, sys.version_info.minor + 1))
    assert install.main([]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'or later; this is' in error


def test_exec_defines_locals_again():
    """As ``get_version`` in basicsr's ``setup.py`` expects, which fails from Python 3.13 on."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(SCRIPT).parent)!r})
from install import _let_exec_define_locals

def get_version(source):
    exec(compile(source, 'version.py', 'exec'))
    return locals()['__version__']

_let_exec_define_locals()
print(get_version("__version__ = '1.4.2'"))
namespace = {{}}
exec('x = 1', namespace)
print(namespace['x'])
"""
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert result.stdout.split() == ['1.4.2', '1'], result.stderr


def test_without_basicsr_the_command_names_the_one_that_installs_it(environment, tmp_path):
    """The package itself can be imported then, so that its installer runs."""
    (site_packages,) = Path(environment).parents[1].glob('lib/python*/site-packages')
    shutil.rmtree(site_packages / 'basicsr')
    variables = {**os.environ, 'PYTHONPATH': str(ROOT)}

    def python(*arguments):
        return subprocess.run([environment, *arguments], capture_output=True, text=True, env=variables, cwd=tmp_path)

    result = python('-m', 'drtl_plugin', 'train', '-opt', 'x.yml')
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert 'BasicSR is not installed' in line
    command = line.partition('install it with: ')[2]
    assert command == f'{environment} -m drtl_plugin.install'
    result = python('-m', 'drtl_plugin.install', '--help')
    assert (result.returncode, result.stderr) == (0, '')
