"""Metrics of pyiqa (LPIPS, DISTS, NIQE, …), by name in the option file::

    val:
      metrics:
        lpips: {type: calculate_pyiqa, metric: lpips, crop_border: 4, better: lower}

pyiqa is an optional extra: ``pip install 'drtl_plugin[pyiqa]'``. Many of its metrics fetch weights the first time.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
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
        img (ndarray): Restored image, ``(H, W, 3)``, uint8, BGR.
        metric (str): Its name in pyiqa (``pyiqa.list_models()``).
        img2 (ndarray): Ground truth, the same; metrics without reference don't look at it.
        crop_border (int): Pixels that are left out on each side.
        kwargs: Arguments of this metric in pyiqa, e.g. ``test_y_channel: true`` of its ``psnr`` and ``ssim``.

    Returns:
        float: The metric.
    """
    compute = pyiqa_metric(metric, tuple(sorted((key, value) for key, value in kwargs.items() if key not in _OURS)))
    inner = slice(crop_border, -crop_border or None)
    images = [image[inner, inner].astype(np.float32) / 255 for image in (img, img2) if image is not None]
    tensors = [tensor[None] for tensor in img2tensor(images)]
    with torch.no_grad():
        return float(compute(*tensors[: 2 if compute.metric_mode == 'FR' else 1]))


@functools.cache
def pyiqa_metric(metric: str, arguments: tuple[tuple[str, Any], ...] = ()) -> Callable:
    """A metric as pyiqa builds it, on the GPU where there is one; no generator is drawn from.

    Raises:
        ImportError: If pyiqa is missing.
    """
    import pyiqa

    random_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            return pyiqa.create_metric(metric, **dict(arguments))
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
        compute = pyiqa_metric(name, tuple(sorted((k, v) for k, v in section.items() if k not in _OURS)))
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
