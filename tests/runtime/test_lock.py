"""A run's name belongs to one run at a time."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from drtl_plugin import cli
from drtl_plugin.errors import DataError
from drtl_plugin.runtime.lock import exclusive


def test_the_second_run_of_a_name_is_turned_away(workdir, quick_opt, write_opt, capsys):
    path = write_opt(quick_opt)
    script = 'import sys; from drtl_plugin.runtime.lock import exclusive\nwith exclusive("experiments", "drtl_x4"):\n'
    script += '    print("mine", flush=True); sys.stdin.read()'
    with subprocess.Popen([sys.executable, '-c', script], stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == b'mine\n'
        assert cli.main(['train', '-opt', path]) == 2
        error = capsys.readouterr().err
        assert f'experiments/drtl_x4: another run of this name (process {other.pid} of ' in error
        assert error.strip().count('\n') == 0
        assert not (workdir / 'experiments/drtl_x4').exists()
        other.kill()
    assert cli.main(['train', '-opt', path]) == 0


def test_a_name_is_given_once_in_a_process_and_given_back(workdir):
    owner = rf'process {os.getpid()} of {re.escape(socket.gethostname())}'
    with (
        exclusive('experiments', 'x'),
        exclusive('experiments', 'y'),
        pytest.raises(DataError, match=rf'experiments/x: another run of this name \({owner}\) is active'),
        exclusive('experiments', 'x'),
    ):
        pass
    with pytest.raises(KeyError), exclusive('experiments', 'x'):
        raise KeyError
    with exclusive('experiments', 'x'):
        pass


def test_a_loader_that_outlives_a_killed_run_does_not_keep_its_name(workdir):
    script = 'import os, time; from drtl_plugin.runtime.lock import exclusive\nwith exclusive("experiments", "x"):\n'
    script += '    child = os.fork()\n    if child: print(child, flush=True)\n    time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', script], stdout=-1) as run:
        child = int(run.stdout.readline())
        run.kill()
        run.wait()
        with exclusive('experiments', 'x'):
            os.kill(child, signal.SIGKILL)  # fails if it has ended already


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_will_do(workdir, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr('fcntl.flock', flock)
    with exclusive('experiments', 'x'):
        assert Path('experiments').is_dir()
    with exclusive('experiments', 'x'):  # nothing of the first is left that would count as a lock
        pass


def test_a_folder_that_cannot_be_written_is_named(workdir):
    (workdir / 'experiments').write_text('a file')
    with (
        pytest.raises(DataError, match=r'experiments: cannot be written \(File exists\)'),
        exclusive('experiments', 'x'),
    ):
        pass
