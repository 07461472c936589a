"""What is shown of long work, on a terminal and elsewhere."""

import io
import logging
import sys

import pytest

from drtl_plugin import progress as module
from drtl_plugin.compat import quiet_basicsr_log
from drtl_plugin.progress import aside, progress, say, seconds_aside, stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that this module sees, in seconds; as a list of one."""
    now = [1000.0]
    monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])
    return now


@pytest.fixture
def log(caplog, monkeypatch):
    """Switch BasicSR's log on; returns its messages."""
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    caplog.set_level(logging.INFO, 'basicsr')
    return caplog


def slowly(clock: list[float], num: int, seconds: float):
    for item in range(num):
        yield item
        clock[0] += seconds


def test_lines_come_after_two_seconds_and_then_every_ten(clock, log):
    assert list(progress(slowly(clock, 18, 1.0), 'relation', 18, 'task')) == list(range(18))
    # The generator has moved the clock when the next item is asked for: item n is done at n - 1 seconds.
    assert log.messages == ['relation: 3 of 18 tasks', 'relation: 13 of 18 tasks']


def test_fast_loops_say_nothing(clock, log, capsys):
    assert len(list(progress(slowly(clock, 10, 0.1), 'relation', 10))) == 10
    assert not log.messages and not capsys.readouterr().err


def test_terminals_show_a_bar(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    assert list(progress(range(3), 'relation', 3, 'task')) == [0, 1, 2]
    assert 'relation: ' in sys.stderr.getvalue() and '/3 [' in sys.stderr.getvalue()


def test_stages_say_how_long_they_took(clock, log):
    with stage('Fitting'):
        clock[0] += 34.25
    assert log.messages == ['Fitting.', 'Fitting took 34.2 s.']


def test_without_the_log_lines_go_to_stderr_but_not_among_bars(log, capsys, monkeypatch):
    """As in ``basicsr adapt``, and in the checks before a run, also after another run of the process."""
    with quiet_basicsr_log(logging.INFO):
        say('on the way')
        assert capsys.readouterr().err == 'basicsr: on the way\n'
        monkeypatch.setattr(sys, 'stderr', Terminal())
        say('on the way')
        assert sys.stderr.getvalue() == ''
    assert not log.messages


def test_lines_go_to_stderr_after_a_run_has_closed_its_log(capsys, monkeypatch):
    logger = logging.getLogger('basicsr')
    monkeypatch.setattr(logger, 'handlers', [])
    monkeypatch.setattr(logger, 'propagate', False)
    monkeypatch.setattr(logger, 'level', logging.INFO)
    say('on the way')
    assert capsys.readouterr().err == 'basicsr: on the way\n'


def test_only_the_first_process_speaks(log, capsys, monkeypatch):
    monkeypatch.setattr(module, 'get_dist_info', lambda: (1, 2))
    say('on the way')
    assert not log.messages and not capsys.readouterr().err


def test_inner_blocks_count_once_and_failures_too(clock):
    before = seconds_aside()
    with aside():
        clock[0] += 1
        with aside():
            clock[0] += 2
    clock[0] += 50
    with pytest.raises(KeyError), aside():
        clock[0] += 4
        raise KeyError
    assert seconds_aside() - before == 7
