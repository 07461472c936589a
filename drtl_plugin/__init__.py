"""DRTL (Distortion-Relation guided Transfer Learning, arXiv 2111.13078) as a plug-in for BasicSR.

Importing the package repairs what basicsr 1.4.2 lacks on current torch (:mod:`drtl_plugin.compat`) and registers the
plug-in's architectures, datasets, models and meta-trainer hooks with BasicSR's registries.
"""

__version__ = '0.1.0'

from drtl_plugin import compat

compat.apply()

from drtl_plugin import archs, data, meta, models
