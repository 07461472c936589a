"""Install the dependencies that pip alone cannot install: a torch build for this machine, and basicsr.

Run it in the environment for drtl_plugin, as a script or, once the package is installed, as a module::

    python drtl_plugin/install.py
    python -m drtl_plugin.install

1. torch and torchvision. On Linux, PyPI has only CUDA builds of several GB. Without an NVIDIA GPU, the CPU builds
   are installed from PyTorch's own index, or from the default index if that fails.
2. basicsr 1.4.2, which PyPI has only as source. Its build requires torch without using it, so pip downloads torch
   again for an isolated build environment, and the build fails from Python 3.13 on. It is built here in the current
   environment, which needs setuptools and no compiler.

An installed torch, torchvision or basicsr is not changed. The module uses the standard library only, since it runs
before anything else is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

OLDEST_PYTHON = (3, 10)
CPU_INDEX = 'https://download.pytorch.org/whl/cpu'
OLDEST_TORCH = (2, 6)
BASICSR = 'basicsr==1.4.2'
# The oldest setuptools that builds wheels by itself, and the last that has pkg_resources, which tensorboard imports.
SETUPTOOLS = 'setuptools>=70.1,<81'


class InstallError(Exception):
    """A step failed; the message says which one and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the installer.

    Args:
        argv (Sequence[str] | None): Arguments, ``sys.argv[1:]`` by default.

    Returns:
        int: 0, or 2 after an error, printed as one line.
    """
    parser = argparse.ArgumentParser(prog='install', description='Install torch and basicsr for drtl_plugin.')
    parser.add_argument('--cpu-index', default=CPU_INDEX, metavar='URL', help=f"PyTorch's CPU builds; {CPU_INDEX}")
    args = parser.parse_args(argv)
    try:
        check_python()
        install_torch(args.cpu_index)
        install_basicsr()
    except InstallError as error:
        print(f'install: error: {error}', file=sys.stderr)
        return 2
    return 0


def check_python() -> None:
    """Check Python and pip.

    Raises:
        InstallError: If Python is too old or has no pip.
    """
    if sys.version_info < OLDEST_PYTHON:
        oldest = '.'.join(map(str, OLDEST_PYTHON))
        raise InstallError(f'drtl_plugin needs Python {oldest} or later; this is {sys.version.split()[0]}.')
    if importlib.util.find_spec('pip') is None:
        raise InstallError(f'{sys.executable} has no pip; install it with: {sys.executable} -m ensurepip')


def has_nvidia_driver() -> bool:
    """Whether ``nvidia-smi -L`` lists a GPU."""
    command = shutil.which('nvidia-smi')
    if command is None:
        return False
    result = subprocess.run([command, '-L'], capture_output=True, text=True)
    return result.returncode == 0 and 'GPU' in result.stdout


def install_torch(cpu_index: str) -> None:
    """Install torch and torchvision if they are missing.

    Args:
        cpu_index (str): URL of an index of CPU builds.

    Raises:
        InstallError: If pip fails, the installed torch is too old, or there is an NVIDIA GPU on Windows, for which PyPI
            has no builds.
    """
    installed = _version('torch')
    if installed is not None and _numbers(installed) < OLDEST_TORCH:
        raise InstallError(
            f'torch {installed} is too old; uninstall torch and torchvision, then run this again to get newer ones.'
        )
    if installed is not None and _version('torchvision') is not None:
        return
    # pip chooses the release of torchvision that fits torch, by its dependencies.
    wanted = ['torch>=2.6', 'torchvision'] if installed is None else [f'torch=={installed}', 'torchvision']
    has_gpu = has_nvidia_driver()
    if has_gpu and sys.platform == 'win32' and installed is None:
        raise InstallError(
            "PyPI's torch for Windows does not use NVIDIA GPUs; install torch and torchvision as "
            'https://pytorch.org/get-started describes, then run this again.'
        )
    if has_gpu or sys.platform == 'darwin':
        _say('installing torch and torchvision from the default index.')
    else:
        _say(f'no NVIDIA GPU found: installing the CPU builds of torch and torchvision (0.2 GB) from {cpu_index}.')
        # The dependencies of torch come from the default index, in the next step of any installation.
        options = ['--index-url', cpu_index, '--retries', '1', '--timeout', '15']
        reason = _pip('install', *options, *(['--no-deps'] if installed is None else []), *wanted, shows_errors=False)
        if reason is None:
            return
        _say(f'that failed ({reason}); using the default index, whose Linux builds include CUDA (3 GB).')
    if _pip('install', *wanted) is not None:
        raise InstallError('pip could not install torch and torchvision; see its messages above.')


def install_basicsr() -> None:
    """Build basicsr in this environment and install it, unless it is installed.

    Raises:
        InstallError: If pip fails.
    """
    if _version('basicsr') is not None:
        return
    _say(f'building {BASICSR}; no compiler is needed.')
    with tempfile.TemporaryDirectory() as folder:
        wheels, shim = Path(folder, 'wheels'), Path(folder, 'shim')
        shim.mkdir()
        (shim / 'sitecustomize.py').write_text(
            f'{inspect.getsource(_let_exec_define_locals)}\n\n_let_exec_define_locals()\n', encoding='utf-8'
        )
        # pip rejects build constraints if there is no build environment.
        environment = {key: value for key, value in os.environ.items() if key != 'PIP_BUILD_CONSTRAINT'}
        if sys.version_info >= (3, 13):
            environment['PYTHONPATH'] = str(shim)
        options = ['--no-deps', '--no-build-isolation', '--use-pep517', '--wheel-dir', str(wheels)]
        steps = (
            lambda: _pip('install', SETUPTOOLS),
            lambda: _pip('wheel', *options, BASICSR, environment=environment),
            lambda: _pip('install', *map(str, wheels.glob('*.whl'))),
        )
        if any(step() is not None for step in steps):
            raise InstallError(f'pip could not build {BASICSR}; see its messages above.')


def _let_exec_define_locals():
    """Let ``exec(source)`` define names in ``locals()``, as before Python 3.13 (PEP 667).

    basicsr's ``setup.py`` reads its version that way. This runs as ``sitecustomize`` of the build, hence its imports.
    """
    import builtins
    import sys

    original = builtins.exec

    def exec_in_calling_frame(source, *namespaces, **options):
        if not namespaces and not options:
            frame = sys._getframe(1)
            namespaces = frame.f_globals, frame.f_locals
        original(source, *namespaces, **options)

    builtins.exec = exec_in_calling_frame


def _pip(*arguments: str, environment: dict[str, str] | None = None, shows_errors: bool = True) -> str | None:
    """Run pip, with its progress bars on a terminal.

    Returns:
        str | None: None on success, else the last line of its errors (if they are not shown).
    """
    options = ['--disable-pip-version-check', *(() if sys.stdout.isatty() else ('--quiet',))]
    command = [sys.executable, '-m', 'pip', arguments[0], *options, *arguments[1:]]
    result = subprocess.run(command, env=environment, stderr=None if shows_errors else subprocess.PIPE, text=True)
    if result.returncode == 0:
        return None
    return ((result.stderr or '').strip().splitlines() or ['pip failed'])[-1]


def _version(name: str) -> str | None:
    """Version of an installed distribution; ignores folders of this name in the current directory."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r'\d+', version.partition('+')[0])[:2])


def _say(line: str) -> None:
    print(f'install: {line}', flush=True)


if __name__ == '__main__':
    sys.exit(main())
