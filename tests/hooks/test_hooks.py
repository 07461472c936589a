import csv
import re
from types import SimpleNamespace

import pytest
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from drtl_plugin import cli
from drtl_plugin.errors import OptionError
from drtl_plugin.hooks import META_HOOK_REGISTRY, MetaTrainerHook
from drtl_plugin.hooks.base import DEFAULT_HOOKS, build_hooks


def types(hooks) -> list[str]:
    return [type(hook).__name__ for hook in hooks]


def test_shipped_hooks_are_there_in_order_of_priority():
    assert types(build_hooks([])) == ['NanGuardHook', 'RelationHook', 'FewShotAdaptHook', 'GraphRecordHook']
    assert all(isinstance(hook, Hook) for hook in build_hooks([]))


def test_shipped_hooks_are_mmengines_too():
    assert all(HOOKS.get(name) is META_HOOK_REGISTRY.get(name) for name in DEFAULT_HOOKS)


def test_entries_set_arguments_of_shipped_hooks():
    hooks = build_hooks([{'type': 'RelationHook', 'interval': 7}])
    assert len(hooks) == len(DEFAULT_HOOKS)
    assert hooks[1].interval == 7


def test_annotations_that_only_type_checkers_import(monkeypatch):
    monkeypatch.setattr(META_HOOK_REGISTRY, '_obj_map', dict(META_HOOK_REGISTRY._obj_map))

    @META_HOOK_REGISTRY.register()
    class NotedHook(MetaTrainerHook):
        def __init__(self, folder: 'OnlyForTypeCheckers', every: int = 1):  # noqa: F821
            self.folder, self.every = folder, every

    (hook,) = (
        hook for hook in build_hooks([{'type': 'NotedHook', 'folder': 'x', 'every': 2}]) if isinstance(hook, NotedHook)
    )
    assert (hook.folder, hook.every) == ('x', 2)
    with pytest.raises(OptionError, match="unknown argument of NotedHook 'foldr'; did you mean 'folder'"):
        build_hooks([{'type': 'NotedHook', 'foldr': 'x'}])


def test_hooks_of_ones_own_are_added_by_name(monkeypatch):
    monkeypatch.setattr(META_HOOK_REGISTRY, '_obj_map', dict(META_HOOK_REGISTRY._obj_map))

    @META_HOOK_REGISTRY.register()
    class FirstHook(MetaTrainerHook):
        priority = 'HIGHEST'

    assert types(build_hooks([{'type': 'FirstHook'}] * 2))[:3] == ['FirstHook', 'FirstHook', 'NanGuardHook']


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (
            {'type': 'RelationHok'},
            r"hooks\[0\] \(--import .*\): unknown meta-trainer hook 'RelationHok'; did you mean 'RelationHook'",
        ),
        (
            {'type': 'RelationHook', 'intervall': 5},
            r"argument of RelationHook 'intervall'; did you mean 'interval'",
        ),
        ({'interval': 5}, r"unknown meta-trainer hook 'None'"),
        ({'type': 'RelationHook', 'interval': 0}, r'must be above 0'),
        ({'type': 'RelationHook', 'transfer_lr': -1}, r'must be above 0'),
        ({'type': 'RelationHook', 'num_patches': 1}, r'num_patches must be at least 2'),
        ({'type': 'NanGuardHook', 'max_skips': -1}, r'max_skips must be at least 0'),
        ({'type': 'RelationHook', 'interval': 1.5}, r'hooks\[0\]\.interval: expected a whole number, got 1\.5'),
        ({'type': 'RelationHook', 'drn_lr': 'fast'}, r"hooks\[0\]\.drn_lr: expected a number, got 'fast'"),
    ],
)
def test_wrong_entries_are_named(entry, message):
    with pytest.raises(OptionError, match=message):
        build_hooks([entry])


def test_metrics_of_all_validations_are_recorded(workdir, quick_opt, write_opt):
    quick_opt['val']['val_freq'] = 1
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
    root = workdir / 'experiments' / quick_opt['name']
    with open(root / 'metrics.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    # BasicSR's log, a line for each metric of each validation, tells the same, to 4 digits; it validates once more in
    # the end.
    (log,) = root.glob('train_*.log')
    logged = re.findall(r'# (psnr_y|ssim_y): ([\d.]+)', log.read_text())
    assert {(row['metric'], f'{float(row["value"]):.4f}') for row in rows} == set(logged)
    steps = [(row['iteration'], row['dataset']) for row in rows if row['metric'] == 'psnr_y']
    names = ('sample_camera', 'sample_camera_adapted')
    assert sorted(steps) == sorted([('0', 'sample_camera_bicubic'), *((step, name) for step in '12' for name in names)])


def test_states_of_older_versions_are_taken():
    hook = build_hooks([])[-1]
    hook.after_load_checkpoint(SimpleNamespace(graph=None), {'graph_record': {'rows': [[1]], 'is_latest': False}})
    assert hook._rows == [[1]]
