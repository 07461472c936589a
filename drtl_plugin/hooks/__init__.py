"""Meta-trainer hooks, registered in META_HOOK_REGISTRY: the four that every run has, and a base class for your own."""

from drtl_plugin.hooks.base import META_HOOK_REGISTRY, MetaTrainerHook, Runner
from drtl_plugin.hooks.few_shot_adapt_hook import FewShotAdaptHook
from drtl_plugin.hooks.graph_record_hook import GraphRecordHook
from drtl_plugin.hooks.nan_guard_hook import NanGuardHook
from drtl_plugin.hooks.relation_hook import RelationHook

__all__ = [
    'META_HOOK_REGISTRY',
    'FewShotAdaptHook',
    'GraphRecordHook',
    'MetaTrainerHook',
    'NanGuardHook',
    'RelationHook',
    'Runner',
]
