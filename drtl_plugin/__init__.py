"""DRTL (Distortion-Relation guided Transfer Learning, arXiv 2111.13078) as a plug-in for BasicSR.

Importing the package repairs what basicsr 1.4.2 lacks on current torch (:mod:`drtl_plugin.compat`), and registers the
plug-in's architectures, datasets, losses, metrics, models and meta-trainer hooks with BasicSR's registries.
"""

__version__ = '0.2.0'

import importlib.util
import os
from pathlib import Path

# The threads of torch on the CPU wait for each other by spinning. Where anything else wants a core (loader processes, a
# second run), they spin while those with work to do stand still: of two runs on two cores, each was 45 times as slow
# as one alone. With a shorter spin it is 3.5 times as slow, and one alone as fast as before. OpenMP reads this when
# torch is loaded.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '5000')


def has_basicsr() -> bool:
    """Whether ``import basicsr`` finds the package: a checkout of BasicSR has no ``version.py`` until it is built."""
    spec = importlib.util.find_spec('basicsr')
    return spec is not None and spec.origin is not None and Path(spec.origin).with_name('version.py').is_file()


# Without BasicSR there are no registries to fill, and drtl_plugin.install, which installs it, has to run.
if has_basicsr():
    from drtl_plugin.compat import basicsr as compat

    compat.apply()

    from drtl_plugin import archs, data, hooks, losses, metrics, models
