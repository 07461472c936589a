"""The benchmarks start, and print their help; the arms of the paper's system are what they claim."""

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from drtl_plugin.models import DRTLModel
from drtl_plugin.sources.sample import prepare_sample_data
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


@pytest.mark.slow
@pytest.mark.parametrize('pipeline', ['pretrain', 'meta'])
def test_the_arms_of_the_paper_measure_their_relation(pipeline, tmp_path, monkeypatch, real_data):
    monkeypatch.syspath_prepend(OPTIONS.parent / 'benchmarks')
    realworld = importlib.import_module('realworld')
    job = realworld.Job(real_data, tmp_path, 'nikon_x4', f'paper {pipeline}', 5, 0, 2, (0, 1), ('',))
    job.network.parent.mkdir()
    model, _ = realworld.trained_model(job)
    assert model.num_update == 2  # the measurement takes no training steps away
    assert model.weights.max() > 1.2 * model.weights.min()
    torch.testing.assert_close(model.weights, 17 * torch.softmax(model.graph.relation, 0))
    assert not model.drtl.camera_fit and model.drtl.weighting.mode == 'gradient'
    model, _ = realworld.trained_model(job)  # from the file
    torch.testing.assert_close(model.weights, torch.load(job.network, weights_only=True)['weights'])


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(OPTIONS.parent / 'benchmarks')
    return importlib.import_module('compare')


class TestCompare:
    @pytest.mark.slow
    def test_runs_all_arms(self, tmp_path):
        script = OPTIONS.parent / 'benchmarks/compare.py'
        command = [sys.executable, script, '--steps', '2', '--adaptation', '1']
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        live = done.stdout.partition('This seed:')[2].partition('Committed')[0]
        for arm in ('bicubic', 'uniform', 'paper', 'relation', 'fit alone', 'fit and relation'):
            assert re.search(rf'^\| {arm} +\| 1 +\| \d\d\.\d\d +\| \d\d\.\d\d', live, re.MULTILINE)

    @pytest.mark.slow
    def test_arms_have_equal_gradient_evaluations(self, compare, tmp_path):
        root = prepare_sample_data(tmp_path / 'sample')
        support = root / 'camera/support'
        target = {'dataroot_gt': str(support / 'gt'), 'dataroot_lq': str(support / 'lq')}
        counts = {}
        for name in ('bicubic', 'uniform', 'relation', 'fit alone', 'fit and relation'):
            opt = compare.options_of(compare.COMPARED[name], 4, root / 'auxiliary', target, 3, 0)
            model = DRTLModel(opt)
            model.prepare()
            images = []
            model.net_g.register_forward_hook(
                lambda net, inputs, output, images=images: images.append(len(output) * output.requires_grad)
            )
            compare.train(model)
            counts[name] = sum(images)
        assert counts == dict.fromkeys(counts, 3 * 16)

    def test_differences_are_paired(self, compare):
        """Against scipy's interval of a paired t-test."""
        generator = np.random.default_rng(0)
        scene = generator.normal(26, 3, 6)  # far more than arms differ by
        rows = [
            {'arm': arm, 'seed': i // 3, 'image': i % 3, 'before': 0.0, 'after': scene[i] + gain + noise[i]}
            for arm, gain in (('bicubic', 0.0), ('uniform', -1.0), ('relation', 0.2))
            for noise in [generator.normal(0, 0.05, 6)]
            for i in range(6)
        ]
        ours, best = ([row['after'] for row in rows if row['arm'] == arm] for arm in ('relation', 'bicubic'))
        low, high = stats.ttest_rel(ours, best).confidence_interval(0.95)
        lines = compare.table(rows).splitlines()
        assert 'after - bicubic' in lines[0]
        found = next(line for line in lines if line.startswith('| relation')).split('|')[-2]
        mean, half = map(float, found.split('±'))
        assert (mean - half, mean + half) == pytest.approx((low, high), abs=2e-3)
        assert next(line for line in lines if line.startswith('| paper')).split('|')[2].strip() == 'not run'
