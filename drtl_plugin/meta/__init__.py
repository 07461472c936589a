"""Meta-learning: the learner's pure functions, and the meta-trainer hooks (META_HOOK_REGISTRY)."""

from drtl_plugin.hooks.base import META_HOOK_REGISTRY, MetaTrainerHook

__all__ = ['META_HOOK_REGISTRY', 'MetaTrainerHook']
