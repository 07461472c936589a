"""Fixtures: a small world of sample data and option files, in a folder of each test's own."""

from __future__ import annotations

import os

# Before torch: each of several test processes gets along with one thread, and its threads don't spin while others work.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')
# Tests compare bit for bit, so they run on the CPU. make test-gpu runs tests/test_gpu.py on a GPU.
if not os.environ.get('DRTL_TEST_GPU'):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
import drtl_plugin  # noqa: F401  isort: skip
import argparse
from pathlib import Path

import hypothesis
import pytest
import torch
import yaml
from basicsr.models import build_model

from drtl_plugin.options.parse import parse_options
from drtl_plugin.sources.sample import prepare_sample_data

# The same examples each time; the slow profile (make test-slow) looks further.
hypothesis.settings.register_profile('quick', max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile('slow', max_examples=1000, deadline=None, database=None)
hypothesis.settings.load_profile('quick')

OPTIONS = Path(__file__).parent.parent / 'options'


@pytest.fixture(scope='session')
def sample_root(tmp_path_factory) -> Path:
    return prepare_sample_data(tmp_path_factory.mktemp('sample') / 'datasets' / 'drtl_sample')


@pytest.fixture
def workdir(tmp_path, monkeypatch, sample_root) -> Path:
    """An empty current folder in which the shipped option files find the sample data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'datasets').mkdir()
    (tmp_path / 'datasets' / 'drtl_sample').symlink_to(sample_root)
    return tmp_path


@pytest.fixture
def quick_opt() -> dict:
    """The shipped drtl_x4.yml, cut down to seconds."""
    opt = yaml.safe_load((OPTIONS / 'drtl_x4.yml').read_text(encoding='utf-8'))
    opt['datasets']['train'].update(gt_size=64, num_support=1, num_query=1, batch_size_per_gpu=2, num_worker_per_gpu=0)
    opt['datasets']['train']['distortions'] = [
        {'name': 'bicubic'},
        {'name': 'gaussian_blur', 'sigma': [1.0, 1.5]},
        {'name': 'gaussian_noise', 'sigma': [5, 10]},
        {'name': 'jpeg', 'quality': [50, 60]},
    ]
    opt['network_g'].update(num_feat=8, num_block=1)
    opt['network_r'] = {'type': 'DistortionRelationNet', 'num_feat': 8, 'num_embed': 8, 'num_slot': 8}
    opt['drtl']['adapt'].update(steps=2, batch_size=2, replay=0)
    opt['drtl']['camera_fit'] = False
    opt['drtl']['weighting'].update(relation='embedding', effective_tasks=2, mode='gradient')
    hook = {'interval': 2, 'drn_steps': 2, 'drn_patches': 2, 'drn_contents': 4, 'num_patches': 2, 'transfer_steps': 1}
    opt['drtl']['hooks'] = [{'type': 'RelationHook', **hook}]
    opt['train'].update(total_iter=2, scheduler={'type': 'MultiStepLR', 'milestones': [100], 'gamma': 0.5})
    opt['val'].update(val_freq=100)
    opt['logger'].update(print_freq=1, save_checkpoint_freq=100)
    return opt


@pytest.fixture
def write_opt(tmp_path):
    """Write options to a file; returns its path."""

    def write(opt: dict, name: str = 'opt.yml') -> str:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(opt), encoding='utf-8')
        return str(path)

    return write


@pytest.fixture
def build(workdir, write_opt):
    """Build a model from options as the command line does, with its folders there."""

    def build_from(opt: dict):
        args = argparse.Namespace(opt=write_opt(opt), launcher='none', auto_resume=False, debug=False, force_yml=None)
        parsed = parse_options(args, str(workdir), is_train=True)
        parsed['root_path'] = str(workdir)
        for key in ('models', 'training_states', 'visualization'):
            (workdir / parsed['path'][key]).mkdir(parents=True, exist_ok=True)
        return build_model(parsed)

    return build_from


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    """The folder of real photographs that the environment variable DRTL_REAL_DATA names."""
    root = os.environ.get('DRTL_REAL_DATA')
    if not root:
        pytest.skip('DRTL_REAL_DATA does not name a folder of real photographs')
    return Path(root)
