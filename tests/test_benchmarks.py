"""The benchmarks start, and print their help; the arms of the paper's system are what they claim."""

import importlib
import subprocess
import sys

import pytest
import torch

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
