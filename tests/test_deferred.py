"""Imports that wait for the first call."""

import subprocess
import sys

import pytest

from drtl_plugin.compat.deferred import deferred


@pytest.fixture
def slow_module(tmp_path, monkeypatch):
    (tmp_path / 'slow_module.py').write_text('def double(x):\n    return 2 * x\n\nLIMIT = 7\n')
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop('slow_module', None)


def test_a_function_imports_its_module_when_it_is_called(slow_module):
    with deferred('slow_module', 'double'):
        from slow_module import double
    assert 'slow_module' not in sys.modules
    assert double(3) == 6
    assert sys.modules['slow_module'].LIMIT == 7


def test_anything_else_imports_it_at_once(slow_module):
    with deferred('slow_module', 'double'):
        from slow_module import LIMIT
    assert LIMIT == 7
    assert sys.modules['slow_module'].double(3) == 6


def test_a_module_that_is_there_stays(slow_module):
    import slow_module as module

    with deferred('slow_module', 'double'):
        from slow_module import double
    assert double is module.double
    assert sys.modules['slow_module'] is module


_LEFT_OUT = """
import sys
import drtl_plugin
import basicsr
assert not {'torch._dynamo', 'scipy.stats'} & set(sys.modules)
from basicsr.data.degradations import cdf2
import numpy as np
print(np.ravel(cdf2(np.eye(2), np.zeros((1, 2))))[0])
from scipy.stats import norm
print(norm.cdf(0))
"""


def test_basicsr_is_imported_without_what_it_seldom_calls():
    """And its functions still work: the bivariate normal distribution function at the mean is 1/4."""
    done = subprocess.run([sys.executable, '-c', _LEFT_OUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    quarter, half = map(float, done.stdout.split())
    assert quarter == pytest.approx(0.25)
    assert half == pytest.approx(0.5)
