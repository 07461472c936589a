"""Runs that are told to stop."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from drtl_plugin import cli
from drtl_plugin.runtime.signals import Interrupted, StopSignals
from tests.runtime.runs import long_opt, start, wait_for  # noqa: F401


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_in_order(workdir, long_opt, number):  # noqa: F811
    long_opt['logger']['save_checkpoint_freq'] = 1000
    long_opt['train'].update(total_iter=1000, scheduler={'type': 'MultiStepLR', 'milestones': [100]})
    long_opt['val'] = None
    long_opt['drtl']['adapt']['steps'] = 10**6  # nobody waits for that
    path = workdir / 'stopped.yml'
    path.write_text(yaml.safe_dump({**long_opt, 'name': 'stopped'}))
    process = start(workdir, str(path))
    root = workdir / 'experiments/stopped'
    wait_for(process, root, '*.log', 'iter:       3')
    os.killpg(process.pid, number)  # as terminals and schedulers do
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        time.sleep(0.05)
        os.killpg(process.pid, number)  # and launchers once more
    process.join(60)
    assert process.exitcode == 128 + number, (workdir / 'output.txt').read_text()
    (state,) = root.glob('training_states/*.state')
    assert not list((root / 'models').glob('net_g_adapted*'))  # no time for it
    content = torch.load(state, weights_only=True)
    assert content['iter'] == int(state.stem) >= 3
    long_opt['drtl']['adapt']['steps'] = 2
    long_opt['train']['total_iter'] = int(state.stem) + 2
    path.write_text(yaml.safe_dump({**long_opt, 'name': 'stopped'}))
    process = start(workdir, str(path))
    process.join()
    assert process.exitcode == 0
    assert f'iter: {content["iter"]}.' in sorted(root.glob('*.log'))[-1].read_text()


# Ten steps an epoch. In the end, BasicSR saves and validates once more, or saves only.
@pytest.mark.parametrize(
    'when, validated', [('iter:       2', 2), ('Save the latest', 1000), ('Save the latest', None)]
)
def test_a_signal_does_not_wait_for_adaptation(workdir, long_opt, when, validated):  # noqa: F811
    long_opt['logger']['save_checkpoint_freq'] = 1000
    long_opt['train']['total_iter'] = last = 2 if validated == 2 else 5
    long_opt['drtl']['adapt']['steps'] = 10**6
    if validated is None:
        long_opt['val'] = None
    else:
        long_opt['val']['val_freq'] = validated
    path = workdir / 'stopped.yml'
    path.write_text(yaml.safe_dump({**long_opt, 'name': 'stopped'}))
    process = start(workdir, str(path))
    root = workdir / 'experiments/stopped'
    wait_for(process, root, '*.log', when)
    time.sleep(1)
    process.terminate()
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM, (workdir / 'output.txt').read_text()
    (state,) = root.glob('training_states/*')
    assert state.name == f'{last}.state'
    assert torch.load(state, weights_only=True)['epoch'] == 0
    assert not list(root.glob('models/net_g_adapted*'))


def test_a_signal_is_obeyed_where_nobody_reads_the_line(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, 'stderr', Gone())
    with pytest.raises(Interrupted) as exit_info, StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert exit_info.value.code == 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


_LATE_SIGNAL = """
import os, signal
from drtl_plugin.hooks import META_HOOK_REGISTRY, MetaTrainerHook

@META_HOOK_REGISTRY.register()
class LateSignalHook(MetaTrainerHook):
    def after_train(self, runner):
        os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize('resumes', [False, True])  # without steps, too
def test_a_signal_does_not_spoil_the_report(workdir, quick_opt, write_opt, resumes):
    (workdir / 'late.py').write_text(_LATE_SIGNAL)
    quick_opt['logger']['save_checkpoint_freq'] = 1
    path = write_opt(quick_opt)
    if resumes:
        assert cli.main(['train', '-opt', path]) == 0
        (workdir / 'experiments/drtl_x4/report.html').unlink()
    quick_opt['drtl']['hooks'].append({'type': 'LateSignalHook'})
    command = ['train', '-opt', write_opt(quick_opt), '--import', 'late', '--auto_resume']
    result = subprocess.run([sys.executable, '-m', 'drtl_plugin', *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'SIGTERM: the run is complete and ends in a moment; a second signal ends the run at once.' in result.stderr
    assert (workdir / 'experiments/drtl_x4/report.html').is_file()
