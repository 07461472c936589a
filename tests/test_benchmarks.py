"""The benchmarks start: each prints its help."""

import subprocess
import sys

import pytest

from tests.conftest import OPTIONS

SCRIPTS = sorted(
    path for path in OPTIONS.parent.glob('benchmarks/*.py') if "__name__ == '__main__'" in path.read_text('utf-8')
)


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_prints_its_help(script):
    if script.stem == 'perceptual':
        pytest.importorskip('piqa', reason='piqa, a peer, is not installed')
    done = subprocess.run([sys.executable, script, '--help'], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('usage: ')
