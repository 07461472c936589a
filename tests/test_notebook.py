"""``docs/your_camera.ipynb``: its commands parse, and it runs from top to bottom."""

import os
import re
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from drtl_plugin import cli
from tests.conftest import OPTIONS

NOTEBOOK = nbformat.read(OPTIONS.parent / 'docs/your_camera.ipynb', as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == 'code']


def test_it_is_stored_without_results():
    nbformat.validate(NOTEBOOK)
    assert all(not cell.outputs and cell.execution_count is None for cell in CODE)


def test_its_commands_parse():
    commands = [line for cell in CODE for line in re.findall(r'^!basicsr (.*)$', cell.source, re.MULTILINE)]
    assert len(commands) == 5
    for command in commands:
        cli._parser().parse_args(shlex.split(command))


@pytest.mark.slow
def test_it_runs_and_the_network_gains(tmp_path, monkeypatch):
    """In an empty folder, by the interpreter of this test."""
    monkeypatch.setenv('PATH', f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    client = NotebookClient(NOTEBOOK, timeout=1500, resources={'metadata': {'path': str(tmp_path)}})
    client.create_kernel_manager()
    client.km.kernel_cmd = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    client.execute()
    # A cell's output may arrive in several parts.
    said = ''.join(output.text for output in CODE[-1].outputs if output.get('name') == 'stdout')
    gains = [float(gain) for gain in re.findall(r'([+-][\d.]+) dB$', said, re.MULTILINE)]
    assert len(gains) == 3
    assert min(gains) > 0.1
    assert (tmp_path / 'my_camera/report.md').is_file()
