"""Metrics of pyiqa (LPIPS, DISTS, NIQE, …), used in an option file by name::

    val:
      metrics:
        lpips: {type: calculate_pyiqa, metric: lpips, crop_border: 4, better: lower}

pyiqa is an optional extra: ``pip install 'drtl_plugin[pyiqa]'``. Many of its metrics download weights on first use.
"""

from __future__ import annotations

import functools
import json
import logging
import random
from typing import Any

import numpy as np
import torch
from basicsr.metrics.metric_util import reorder_image
from basicsr.utils import img2tensor
from basicsr.utils.registry import METRIC_REGISTRY

from drtl_plugin.errors import DataError, OptionError, unknown

# Keys of a metric's section that BasicSR and this module read; the others are pyiqa's.
_OURS = ('type', 'better', 'metric', 'crop_border')


@METRIC_REGISTRY.register()
def calculate_pyiqa(
    img: np.ndarray, metric: str, img2: np.ndarray | None = None, crop_border: int = 0, **kwargs
) -> float:
    """Compute a metric of pyiqa.

    Args:
        img (ndarray): Restored image, ``(H, W, 3)``, BGR, or ``(H, W)``, uint8.
        metric (str): Name in pyiqa (``pyiqa.list_models()``).
        img2 (ndarray | None): GT, like ``img``; ignored by no-reference metrics.
        crop_border (int): Pixels to ignore at each border.
        kwargs: Arguments of the metric in pyiqa, e.g. ``test_y_channel: true`` for ``psnr`` and ``ssim``.

    Returns:
        float: The value.

    Raises:
        OptionError: If the metric needs GT and there is none.
    """
    compute = pyiqa_metric(metric, **kwargs)
    images = [img, img2] if compute.metric_mode == 'FR' else [img]
    if images[-1] is None:
        raise OptionError(f'val.metrics: {metric} needs GT, which this dataset does not have.')
    inner = slice(crop_border, -crop_border or None)
    images = [reorder_image(image)[inner, inner].astype(np.float32) / 255 for image in images]
    with torch.no_grad():
        return float(compute(*(tensor[None] for tensor in img2tensor(images))))


def pyiqa_metric(metric: str, **arguments: Any) -> Any:
    """Build a metric of pyiqa, on the GPU if there is one; cached by its arguments.

    Args:
        metric (str): Name in pyiqa.
        arguments: Other keys of the metric's section; those that are not pyiqa's are ignored.

    Raises:
        ImportError: If pyiqa is missing.
    """
    return _build(metric, json.dumps({key: arguments[key] for key in arguments if key not in _OURS}, sort_keys=True))


@functools.cache
def _build(metric: str, arguments: str) -> Any:
    import pyiqa

    # Building a metric must not change the random numbers of training.
    random_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            return pyiqa.create_metric(metric, **json.loads(arguments))
    finally:
        random.setstate(random_state)
        np.random.set_state(numpy_state)


def check_pyiqa(section: dict, where: str) -> None:
    """Check the section of a pyiqa metric, and build the metric.

    Args:
        section (dict): ``type: calculate_pyiqa``, ``metric`` and further arguments.
        where (str): Key of the section in the option file.

    Raises:
        OptionError: If pyiqa is missing, does not have the metric or these arguments, or disagrees with ``better``.
        DataError: If the weights of the metric are not on this machine and cannot be downloaded.
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
            f'{where}: the weights of {name} are not on this machine and cannot be downloaded '
            f'({" ".join(str(error).split())}); run the metric once on a machine with a network, and copy '
            f'{torch.hub.get_dir()} and ~/.cache/huggingface from it.'
        ) from None
    better = 'lower' if compute.lower_better else 'higher'
    if section.get('better', 'higher') != better:
        raise OptionError(f'{where}.better: {better} is better for {name}; set better: {better}.')
