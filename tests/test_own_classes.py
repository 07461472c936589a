"""Models, datasets, hooks and estimators of one's own, registered by a module that ``--import`` brings in."""

import re
import sys

import pytest
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from drtl_plugin import cli
from drtl_plugin.data import DistortionTaskDataset
from drtl_plugin.meta import META_HOOK_REGISTRY
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY, needs_trained_network, transfer


@pytest.fixture
def run(workdir, write_opt, monkeypatch):
    """Run ``basicsr train --import own``, where ``own`` has the given code."""
    for registry in (MODEL_REGISTRY, DATASET_REGISTRY, META_HOOK_REGISTRY):
        monkeypatch.setattr(registry, '_obj_map', dict(registry._obj_map))
    monkeypatch.delitem(sys.modules, 'own', raising=False)

    def run(code: str, opt: dict) -> int:
        (workdir / 'own.py').write_text(code)
        return cli.main(['train', '--import', 'own', '-opt', write_opt(opt)])

    yield run
    sys.modules.pop('own', None)


MODEL = """
from basicsr.utils.registry import MODEL_REGISTRY
from drtl_plugin.models import {base}

@MODEL_REGISTRY.register()
class OwnModel({base}):
    def adapt_to_target(self, watch=None):
        super().adapt_to_target(watch)
        print('adapted by OwnModel')
"""


def test_an_adapting_model_needs_no_schedule(workdir, quick_opt, write_opt, run, capsys):
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
    quick_opt['path']['pretrain_network_g'] = 'experiments/drtl_x4/models/net_g_latest.pth'
    quick_opt.update(name='own', model_type='OwnModel')
    quick_opt['train'] = {'pixel_opt': {'type': 'L1Loss'}}
    del quick_opt['logger'], quick_opt['val']['val_freq']
    assert run(MODEL.format(base='DRTLAdaptModel'), quick_opt) == 0
    assert 'adapted by OwnModel' in capsys.readouterr().out
    assert (workdir / 'experiments/own/models/net_g_adapted_latest.pth').is_file()


@pytest.mark.parametrize('base', ['DRTLModel', 'DRTLAdaptModel'])
def test_options_of_derived_models_are_checked_as_strictly(quick_opt, run, capsys, base):
    quick_opt['model_type'] = 'OwnModel'
    quick_opt['val']['entirely_unknown'] = 1
    if base == 'DRTLAdaptModel':
        quick_opt['train'] = {'pixel_opt': {'type': 'L1Loss'}}
    assert run(MODEL.format(base=base), quick_opt) == 2
    assert "val: unknown key 'entirely_unknown'" in capsys.readouterr().err


def test_a_derived_dataset_has_options_of_its_own_and_the_defaults(workdir, quick_opt, run):
    quick_opt['datasets']['train'].update(type='DarkDataset', darkness=0.25)
    del quick_opt['datasets']['train']['num_worker_per_gpu']
    code = """
import dataclasses
from basicsr.utils.registry import DATASET_REGISTRY
from drtl_plugin.data import DistortionTaskDataset
from drtl_plugin.options.parse import TaskDatasetOptions, option

@dataclasses.dataclass(frozen=True)
class DarkOptions(TaskDatasetOptions):
    darkness: float = option(0.5, 'How dark.', 0, 1)

@DATASET_REGISTRY.register()
class DarkDataset(DistortionTaskDataset):
    options_class = DarkOptions

    def gt_patches(self, num, generator):
        with open('drawn.txt', 'a') as file:
            file.write(f'{self.options.darkness} ')
        return super().gt_patches(num, generator) * self.options.darkness
"""
    assert run(code, quick_opt) == 0
    assert set((workdir / 'drawn.txt').read_text().split()) == {'0.25'}


STRIPES = """
from types import SimpleNamespace
import torch
from basicsr.utils.registry import DATASET_REGISTRY
from drtl_plugin.tasks.library import DistortionLibrary

@DATASET_REGISTRY.register()
class StripesDataset(torch.utils.data.Dataset):
    '''Episodes without a single file.'''

    def __init__(self, opt):
        self.opt = opt
        self.options = SimpleNamespace(gt_size=64, use_hflip=False, use_rot=False)
        self.library = DistortionLibrary('default', opt['scale'])
        self.target_pairs = None

    def __len__(self):
        return 100

    def __getitem__(self, index):
        gt = self.gt_patches(2, torch.Generator().manual_seed(index))
        return {'index': index, 'task': index % len(self.library), 'support_gt': gt[:1], 'query_gt': gt[1:]}

    def gt_patches(self, num, generator):
        return torch.rand(num, 3, 1, 64, generator=generator).expand(-1, -1, 64, -1).contiguous()
"""


def test_a_dataset_with_the_same_interface_is_trained_on(workdir, quick_opt, run):
    loader = {'batch_size_per_gpu': 2, 'num_worker_per_gpu': 0}
    quick_opt['datasets']['train'] = {'name': 'stripes', 'type': 'StripesDataset', **loader}
    assert run(STRIPES, quick_opt) == 0
    assert (workdir / 'experiments/drtl_x4/models/net_g_latest.pth').is_file()


def test_a_dataset_without_it_is_named(workdir, quick_opt, run, capsys):
    quick_opt['datasets']['train'] = {'name': 's', 'type': 'StripesDataset', 'batch_size_per_gpu': 2}
    assert run(STRIPES, quick_opt) == 2
    assert 'datasets.train.num_worker_per_gpu is missing' in capsys.readouterr().err
    quick_opt['datasets']['train']['num_worker_per_gpu'] = 0
    sys.modules.pop('own')
    DATASET_REGISTRY._obj_map.pop('StripesDataset')
    assert run(STRIPES.replace('gt_patches', 'patches'), quick_opt) == 2
    expected = (
        'datasets.train.type: DRTLModel trains on DistortionTaskDataset, not StripesDataset, which lacks gt_patch'
    )
    assert expected in capsys.readouterr().err


def test_the_registered_dataset_feeds_the_model(quick_opt, run, monkeypatch, capsys):
    """Episodes come from the same type as what the hooks measure with."""
    monkeypatch.setitem(
        DATASET_REGISTRY._obj_map, 'CountedDataset', type('CountedDataset', (DistortionTaskDataset,), {})
    )
    quick_opt['datasets']['train']['type'] = 'CountedDataset'
    code = """
from mmengine.hooks import Hook
from drtl_plugin.meta import META_HOOK_REGISTRY

@META_HOOK_REGISTRY.register()
class TellHook(Hook):
    def __init__(self, what: str):
        self.what = what

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        print(self.what, type(runner.task_data).__name__)
"""
    quick_opt['drtl']['hooks'].append({'type': 'TellHook', 'what': 'data:'})
    assert run(code, quick_opt) == 0
    assert capsys.readouterr().out.count('data: CountedDataset') == 2


@pytest.mark.parametrize('times', [1, 2])
def test_plain_hooks_of_mmengine_are_called(workdir, quick_opt, run, capsys, times):
    code = """
from mmengine.hooks import Hook
from drtl_plugin.meta import META_HOOK_REGISTRY

@META_HOOK_REGISTRY.register()
class PlainHook(Hook):
    def before_train(self, runner):
        print('plain before_train')

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        print('plain after_train_iter', batch_idx)
"""
    quick_opt['drtl']['hooks'] += [{'type': 'PlainHook'}] * times
    assert run(code, quick_opt) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('plain')]
    assert (
        lines
        == ['plain before_train'] * times + ['plain after_train_iter 0'] * times + ['plain after_train_iter 1'] * times
    )


def test_two_estimators_of_a_name_are_refused(quick_opt, run, capsys):
    code = """
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY

@ESTIMATOR_REGISTRY.register()
def transfer(question):
    raise AssertionError
"""
    assert run(code, quick_opt) == 2
    error = capsys.readouterr().err
    (line,) = error.splitlines()
    assert line.startswith('basicsr: error: --import ')
    assert "An object named 'transfer' was already registered in 'relation estimator' registry!" in line
    assert re.search(r'own\w*\.py:4\)$', line)
    assert ESTIMATOR_REGISTRY.get('transfer') is transfer and needs_trained_network('transfer')
