"""What a training run does beside the steps: it skips spoilt ones, and logs."""

import functools
import re
import time

import pytest
import torch

from drtl_plugin import cli
from drtl_plugin.errors import OptionError
from drtl_plugin.relation import estimators
from drtl_plugin.runtime import loop, progress
from drtl_plugin.runtime.training_log import StepLogger
from tests.runtime.runs import equal


class TestNumbersGoneBad:
    HOOK = """
import torch
from drtl_plugin.hooks import META_HOOK_REGISTRY, MetaTrainerHook

@META_HOOK_REGISTRY.register()
class SpoilHook(MetaTrainerHook):
    priority = 'HIGHEST'

    def __init__(self, iterations: list):
        self.iterations = iterations

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx + 1 in self.iterations:
            runner.batch.lq[0, 0] = float('nan')
"""

    @pytest.fixture
    def spoilt_opt(self, workdir, quick_opt) -> dict:
        (workdir / 'spoil.py').write_text(self.HOOK)
        quick_opt['train']['total_iter'] = 4
        quick_opt['logger']['save_checkpoint_freq'] = 1
        quick_opt['drtl']['hooks'].append({'type': 'SpoilHook', 'iterations': [2, 3]})
        return quick_opt

    @pytest.mark.parametrize('pipeline', ['meta', 'pretrain'])
    def test_steps_are_left_out_and_counted(self, workdir, spoilt_opt, write_opt, pipeline):
        spoilt_opt['drtl']['pipeline'] = pipeline
        assert cli.main(['train', '-opt', write_opt(spoilt_opt), '--import', 'spoil']) == 0
        root = workdir / 'experiments/drtl_x4'
        params = [torch.load(root / f'models/net_g_{i}.pth', weights_only=True) for i in range(1, 5)]
        assert equal(params[0], params[1]) and equal(params[1], params[2])
        assert not equal(params[2], params[3])
        states = [torch.load(root / f'training_states/{i}.state', weights_only=True) for i in (1, 3)]
        assert equal(states[0]['optimizers'], states[1]['optimizers'])
        log = next(root.glob('*.log')).read_text()
        assert 'iteration 3: the loss or the gradient is not finite (learning rate 0.001; tasks ' in log
        assert 'skipped_steps: 2.0000e+00' in log

    def test_too_many_end_the_run(self, workdir, spoilt_opt, write_opt, capsys):
        spoilt_opt['drtl']['hooks'].append({'type': 'NanGuardHook', 'max_skips': 1})
        assert cli.main(['train', '-opt', write_opt(spoilt_opt), '--import', 'spoil']) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(
            'basicsr: error: iteration 3: the loss or the gradient is not finite (learning rate 0.001'
        )
        assert '2 steps were skipped, and max_skips of NanGuardHook is 1' in error
        models = workdir / 'experiments/drtl_x4/models'
        last = torch.load(models / 'net_g_2.pth', weights_only=True)['params']
        assert all(weight.isfinite().all() for weight in last.values())
        assert not (models / 'net_g_3.pth').exists()


class TestWhatTheLogSays:
    def test_steps_are_timed_without_what_is_done_beside_them(self, workdir, quick_opt, write_opt, monkeypatch):
        measure = estimators.ESTIMATOR_REGISTRY.get('embedding')

        @functools.wraps(measure)  # which keeps that it needs a DRN
        def measure_slowly(question):
            time.sleep(3)
            return measure(question)

        monkeypatch.setitem(estimators.ESTIMATOR_REGISTRY._obj_map, 'embedding', measure_slowly)
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        log = next((workdir / 'experiments/drtl_x4').glob('*.log')).read_text()
        # Measured before the first and in the second iteration.
        times = [float(seconds) for seconds in re.findall(r'time \(data\): ([\d.]+)', log)]
        assert len(times) == 2 and max(times) < 2
        assert log.count('Measuring the relation to the target (embedding).\n') == 2
        assert len(re.findall(r'Measuring the relation to the target \(embedding\) took [3-9]\.\d s\.', log)) == 2

    @pytest.mark.parametrize(
        ('iteration', 'eta'), [(1, '1:06:40'), (600, '0:13:20'), (799, '0:00:04'), (800, '0:00:00')]
    )
    def test_eta_is_the_time_of_the_steps_that_are_left(self, caplog, monkeypatch, iteration, eta):
        opt = {'name': 'x', 'logger': {'print_freq': 1, 'use_tb_logger': False}, 'train': {'total_iter': 1001}}
        opt['train']['total_iter'] = 1001 if iteration == 1 else 800
        logger = StepLogger(opt, 0, None)
        logger.start_time -= 10_000  # hours of validation
        monkeypatch.setattr(logger.logger, 'propagate', True)
        caplog.set_level('INFO', 'basicsr')
        log = {'epoch': 0, 'iter': iteration, 'lrs': [1e-3], 'time': 4.0, 'data_time': 0.1}
        logger(log)
        assert f'[eta: {eta}, time (data): 4.000 (0.100)]' in caplog.messages[-1]

    @pytest.mark.parametrize('waits', [True, False])
    def test_slow_first_iterations_are_reported(self, workdir, quick_opt, write_opt, monkeypatch, waits):
        monkeypatch.setattr(progress, '_FIRST', 0 if waits else 600)
        monkeypatch.setattr(progress, '_INTERVAL', 0)
        quick_opt['train']['total_iter'] = 6
        quick_opt['logger']['print_freq'] = 4
        quick_opt['drtl']['weighting']['relation'] = 'uniform'
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        log = next((workdir / 'experiments/drtl_x4').glob('*.log')).read_text()
        lines = re.findall(r'Iteration (\d) of 6 is done; the log has losses and times every 4 iterations\.', log)
        assert lines == (['1', '2', '3'] if waits else [])

    @pytest.mark.parametrize(('total', 'expected'), [(4, [2, 4]), (5, [2, 4, 5])])
    def test_validations_name_their_iteration_and_are_not_repeated(
        self, workdir, quick_opt, write_opt, total, expected
    ):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        quick_opt['train']['total_iter'] = total
        quick_opt['datasets']['train']['num_episodes'] = 4  # two iterations an epoch
        quick_opt['val'].update(val_freq=2, save_img=True)
        quick_opt['drtl']['weighting']['relation'] = 'uniform'
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        root = workdir / 'experiments/drtl_x4'
        log = next(root.glob('*.log')).read_text()
        assert log.count('Validation sample_camera\n') == len(expected)
        assert set(map(int, re.findall(r'@ (\d+) iter', log))) <= set(expected)
        events = EventAccumulator(str(workdir / 'tb_logger/drtl_x4')).Reload()
        steps = [event.step for event in events.Scalars('metrics/sample_camera/psnr_y')]
        assert steps == expected
        rows = [line.split(',') for line in (root / 'metrics.csv').read_text().splitlines()]
        assert [int(row[0]) for row in rows if row[1:3] == ['sample_camera', 'psnr_y']] == expected
        images = (root / 'visualization/coffee').iterdir()
        assert {path.stem for path in images} == {f'coffee_{iteration}' for iteration in expected}

    def test_a_run_that_is_resumed_at_its_end_validates_once(self, workdir, quick_opt, write_opt):
        quick_opt['val']['val_freq'] = 2
        quick_opt['logger']['save_checkpoint_freq'] = 2
        path = write_opt(quick_opt)
        for _ in range(2):
            assert cli.main(['train', '-opt', path, '--auto_resume']) == 0
            log = max((workdir / 'experiments/drtl_x4').glob('*.log')).read_text()
            assert log.count('Validation sample_camera\n') == 1

    @pytest.mark.slow
    def test_the_camera_is_fitted_once(self, workdir, quick_opt, write_opt):
        quick_opt['drtl']['camera_fit'] = True
        quick_opt['datasets']['train']['target']['seed'] = 1
        quick_opt['datasets']['train']['target']['num_shot'] = 2  # no other test has this fit
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        log = next((workdir / 'experiments/drtl_x4').glob('*.log')).read_text()
        name = r'Fitting the camera \(2 pairs\)'
        assert re.search(rf'{name}\.\n.*{name} took \d+\.\d s\.', log, re.DOTALL)
        assert log.count('Fitting the camera (2 pairs).') == 1


def test_tensorboard_is_closed_where_the_model_cannot_be_built(workdir, quick_opt, write_opt, monkeypatch):
    closed = []

    class Writer:
        def close(self):
            closed.append(self)

    def fail(opt):
        raise OptionError('no model')

    monkeypatch.setattr(loop, 'open_tensorboard', lambda opt, first_iter: Writer())
    monkeypatch.setattr(loop, 'build_model', fail)
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
    assert len(closed) == 1
