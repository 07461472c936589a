"""Models, datasets, hooks and estimators of one's own, registered by a module that ``--import`` brings in."""

import re
import subprocess
import sys

import pytest
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from drtl_plugin import cli
from drtl_plugin.data import DistortionTaskDataset
from drtl_plugin.hooks import META_HOOK_REGISTRY, Runner
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY, needs_trained_network, transfer
from tests.models.helpers import feed


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
    def adapt_to_target(self):
        super().adapt_to_target()
        print('adapted by OwnModel')
"""


def test_a_derived_model_trains_adapts_validates_and_resumes(workdir, quick_opt, write_opt, run, capsys):
    quick_opt.update(name='own', model_type='OwnModel')
    quick_opt['logger']['save_checkpoint_freq'] = 1
    quick_opt['path']['resume_state'] = None
    assert run(MODEL.format(base='DRTLModel'), quick_opt) == 0
    output = capsys.readouterr()
    assert output.out.count('adapted by OwnModel') == 2  # after each step, for its checkpoint
    assert 'after adaptation' in output.out
    models = workdir / 'experiments/own/models'
    assert {'net_g_latest.pth', 'net_g_adapted_latest.pth'} <= {path.name for path in models.iterdir()}
    quick_opt['train']['total_iter'] = 3
    assert cli.main(['train', '--import', 'own', '--auto_resume', '-opt', write_opt(quick_opt)]) == 0
    assert (models / 'net_g_adapted_3.pth').is_file()


def test_a_derived_model_measures_the_relation(workdir, quick_opt, write_opt, run):
    quick_opt['model_type'] = 'OwnModel'
    (workdir / 'own.py').write_text(MODEL.format(base='DRTLModel'))
    assert cli.main(['relation', '--import', 'own', '-opt', write_opt(quick_opt)]) == 0
    assert (workdir / 'results/drtl_x4_relation/knowledge_graph.json').is_file()


def test_an_adapting_model_needs_no_schedule(workdir, quick_opt, write_opt, run, capsys):
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
    quick_opt['path']['pretrain_network_g'] = 'experiments/drtl_x4/models/net_g_latest.pth'
    quick_opt.update(name='own', model_type='OwnModel')
    quick_opt['train'] = {'pixel_opt': {'type': 'L1Loss'}}
    del quick_opt['logger'], quick_opt['val']['val_freq']
    assert run(MODEL.format(base='DRTLAdaptModel'), quick_opt) == 0
    assert 'adapted by OwnModel' in capsys.readouterr().out
    assert (workdir / 'experiments/own/models/net_g_adapted_latest.pth').is_file()


def test_a_model_that_takes_no_steps_has_no_schedule(quick_opt, run, capsys):
    quick_opt.update(name='own', model_type='OwnModel')
    code = MODEL.format(base='DRTLModel') + '    takes_steps = False\n'
    assert run(code, quick_opt) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(': OwnModel does not train; its settings are in drtl.adapt.')


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
from typing import Annotated
from basicsr.utils.registry import DATASET_REGISTRY
from msgspec import Meta
from drtl_plugin.data import DistortionTaskDataset
from drtl_plugin.options.sections import TaskDatasetOptions

class DarkOptions(TaskDatasetOptions):
    darkness: Annotated[float, Meta(ge=0, le=1, description='How dark.')] = 0.5

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
        return {'index': index, 'support_gt': gt[:1], 'query_gt': gt[1:]}

    def gt_patches(self, num, generator):
        return torch.rand(num, 3, 1, 64, generator=generator).expand(-1, -1, 64, -1).contiguous()
"""


def test_a_dataset_with_the_same_interface_is_trained_on(workdir, quick_opt, run):
    loader = {'batch_size_per_gpu': 2, 'num_worker_per_gpu': 0}
    quick_opt['datasets']['train'] = {'name': 'stripes', 'type': 'StripesDataset', **loader}
    assert run(STRIPES, quick_opt) == 0
    assert (workdir / 'experiments/drtl_x4/models/net_g_latest.pth').is_file()


def test_a_dataset_with_the_same_interface_may_have_a_target(workdir, quick_opt, run):
    """Its pairs are adapted to, and the camera is fitted to them, without a ``target`` section."""
    loader = {'batch_size_per_gpu': 2, 'num_worker_per_gpu': 0}
    quick_opt['datasets']['train'] = {'name': 'stripes', 'type': 'StripesDataset', **loader}
    quick_opt['drtl']['weighting']['relation'] = 'uniform'
    code = (
        STRIPES.replace('self.target_pairs = None', 'self.target_pairs = [self.pair(i) for i in range(2)]')
        + """
    def pair(self, seed):
        gt = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(seed))
        lq = torch.nn.functional.interpolate(gt[None], scale_factor=0.25, mode='area')[0]
        return (lq * 255).byte(), (gt * 255).byte()
"""
    )
    assert run(code, quick_opt) == 0
    assert (workdir / 'experiments/drtl_x4/models/net_g_adapted_latest.pth').is_file()


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
from drtl_plugin.hooks import META_HOOK_REGISTRY
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY, needs_trained_network, transfer

@META_HOOK_REGISTRY.register()
class TellHook(Hook):
    def __init__(self, what: str):
        self.what = what

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        print(self.what, type(runner.train_set).__name__)
"""
    quick_opt['drtl']['hooks'].append({'type': 'TellHook', 'what': 'data:'})
    assert run(code, quick_opt) == 0
    assert capsys.readouterr().out.count('data: CountedDataset') == 2


@pytest.mark.parametrize('times', [1, 2])
def test_plain_hooks_of_mmengine_are_called(workdir, quick_opt, run, capsys, times):
    code = """
from mmengine.hooks import Hook
from drtl_plugin.hooks import META_HOOK_REGISTRY
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY, needs_trained_network, transfer

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


SHY_HOOK = """
from drtl_plugin.hooks import META_HOOK_REGISTRY, {base}

@META_HOOK_REGISTRY.register()
class OwnHook({base}):
    pass
"""


@pytest.mark.parametrize(
    ('base', 'entries'),
    [
        ('RelationHook', [{'type': 'RelationHook'}, {'type': 'RelationHook', 'interval': 5}]),
        ('RelationHook', [{'type': 'RelationHook'}, {'type': 'OwnHook'}]),
        ('GraphRecordHook', [{'type': 'OwnHook'}, {'type': 'OwnHook'}]),
    ],
)
def test_two_hooks_of_one_default_type_are_refused_in_a_line(quick_opt, run, capsys, base, entries):
    quick_opt['drtl']['hooks'] = entries
    assert run(SHY_HOOK.format(base=base), quick_opt) == 2
    error = capsys.readouterr().err
    assert error == (
        f'basicsr: error: drtl.hooks[1]: there can be only one {base}; write its arguments into one entry.\n'
    )


def test_a_hook_derived_from_a_default_one_takes_its_place(workdir, quick_opt, run, capsys):
    code = SHY_HOOK.format(base='RelationHook').replace(
        '    pass',
        """
    def measure(self, runner):
        print('measured by OwnHook')
        super().measure(runner)
""",
    )
    quick_opt['drtl']['hooks'][0]['type'] = 'OwnHook'
    assert run(code, quick_opt) == 0
    assert capsys.readouterr().out.count('measured by OwnHook') == 2  # before training, and after the interval of 2
    with open(workdir / 'experiments/drtl_x4/weights.csv') as file:
        assert len(file.readlines()) == 1 + 2 * 4


def test_a_model_is_a_runner(build, quick_opt):
    """All that a hook may use is there once training has started and a step was taken."""
    model = build(quick_opt)
    feed(model, [0, 1])
    model.optimize_parameters(1)
    assert isinstance(model, Runner)
    assert Runner.__annotations__.keys() <= vars(model).keys()


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
    assert re.search(r'own\w*\.py:[45]\)$', line)  # Python 3.10 names the line below the decorator
    assert ESTIMATOR_REGISTRY.get('transfer') is transfer and needs_trained_network('transfer')


@pytest.mark.parametrize('command', [['upscale', '-i', 'a.png', '-o', 'out'], ['export', '--onnx', 'a.onnx']])
def test_modules_may_look_up_the_models_by_name(tmp_path, command):
    base = "MODEL_REGISTRY.get('DRTLModel')"
    code = f'from basicsr.utils.registry import MODEL_REGISTRY\n\nclass Own({base}):\n    pass\n'
    (tmp_path / 'own.py').write_text(code)
    words = [sys.executable, '-m', 'drtl_plugin', *command, '--weights', 'w.pth', '--import', 'own']
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert 'KeyError' not in result.stderr and 'w.pth' in result.stderr.splitlines()[-1]


def test_what_a_module_cannot_import_is_named_with_its_line(quick_opt, run, capsys):
    assert run('\nfrom drtl_plugin.meta import META_HOOK_REGISTRY\n', quick_opt) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("basicsr: error: --import own: cannot import name 'META_HOOK_REGISTRY' from 'drtl_plugin.me")
    assert re.search(r'own\.py:2\)\.$', line)
