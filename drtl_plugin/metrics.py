"""Metrics of pyiqa (LPIPS, DISTS, NIQE, …), by name in the option file::

    val:
      metrics:
        lpips: {type: calculate_pyiqa, metric: lpips, crop_border: 4, better: lower}

pyiqa is an optional extra: ``pip install 'drtl_plugin[pyiqa]'``. Many of its metrics fetch weights the first time.
"""

from __future__ import annotations

import functools
import json
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from basicsr.metrics.metric_util import reorder_image
from basicsr.utils import img2tensor
from basicsr.utils.registry import METRIC_REGISTRY

from drtl_plugin.errors import DataError, OptionError, unknown

# What BasicSR and this module read of a metric's section; the rest is pyiqa's.
_OURS = ('type', 'better', 'metric', 'crop_border')


@METRIC_REGISTRY.register()
def calculate_pyiqa(
    img: np.ndarray, metric: str, img2: np.ndarray | None = None, crop_border: int = 0, **kwargs
) -> float:
    """A metric of pyiqa.

    Args:
        img (ndarray): Restored image, ``(H, W, 3)``, BGR, or ``(H, W)``, uint8.
        metric (str): Its name in pyiqa (``pyiqa.list_models()``).
        img2 (ndarray): Ground truth, the same; metrics without reference don't look at it.
        crop_border (int): Pixels that are left out on each side.
        kwargs: Arguments of this metric in pyiqa, e.g. ``test_y_channel: true`` of its ``psnr`` and ``ssim``.

    Returns:
        float: The metric.

    Raises:
        OptionError: If there is no ground truth, and the metric wants one.
    """
    compute = pyiqa_metric(metric, **kwargs)
    images = [img, img2] if compute.metric_mode == 'FR' else [img]
    if images[-1] is None:
        raise OptionError(f'val.metrics: {metric} compares with a ground truth, and this dataset has none.')
    inner = slice(crop_border, -crop_border or None)
    images = [reorder_image(image)[inner, inner].astype(np.float32) / 255 for image in images]
    with torch.no_grad():
        return float(compute(*(tensor[None] for tensor in img2tensor(images))))


def pyiqa_metric(metric: str, **arguments: Any) -> Callable:
    """A metric as pyiqa builds it, on the GPU where there is one; once for the same arguments.

    Args:
        metric (str): Its name in pyiqa.
        arguments: Its further arguments; those that are not pyiqa's are left out.

    Raises:
        ImportError: If pyiqa is missing.
    """
    return _build(metric, json.dumps({key: arguments[key] for key in arguments if key not in _OURS}, sort_keys=True))


@functools.cache
def _build(metric: str, arguments: str) -> Callable:
    import pyiqa

    # The course of training is the same with and without.
    random_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            return pyiqa.create_metric(metric, **json.loads(arguments))
    finally:
        random.setstate(random_state)
        np.random.set_state(numpy_state)


def check_pyiqa(section: dict, where: str) -> None:
    """Check the section of a metric of pyiqa, and build it.

    Args:
        section (dict): ``type: calculate_pyiqa``, ``metric`` and further arguments.
        where (str): Its key in the option file.

    Raises:
        OptionError: If pyiqa is missing, has no such metric or not with these arguments, or ``better`` says otherwise.
        DataError: If the weights of the metric are not on this machine and cannot be fetched.
    """
    try:
        import pyiqa
    except ImportError as error:
        raise OptionError(f"{where}: pyiqa is missing ({error}); pip install 'drtl_plugin[pyiqa]'.") from None
    logging.getLogger('pyiqa').setLevel(logging.WARNING)
    name = section['metric']
    if name not in pyiqa.list_models():
        raise unknown('metric of pyiqa', name, pyiqa.list_models(), f'{where}.metric')
    try:
        compute = pyiqa_metric(**section)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise OptionError(f'{where}: pyiqa cannot build {name}: {" ".join(str(error).split())}') from None
    except (OSError, RuntimeError) as error:
        raise DataError(
            f'{where}: the weights of {name} are not on this machine, and could not be fetched '
            f'({" ".join(str(error).split())}); run it once where there is a network, and copy '
            f'{torch.hub.get_dir()} and ~/.cache/huggingface from there.'
        ) from None
    better = 'lower' if compute.lower_better else 'higher'
    if section.get('better', 'higher') != better:
        raise OptionError(f'{where}.better: of {name}, {better} is better; say so.')
