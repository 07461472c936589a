"""``basicsr export``: ONNX, and weights with the layer names that spandrel (chaiNNer) expects."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.runtime import checkpoints
from drtl_plugin.runtime.trained_network import TrainedNetwork

# Other programs expect the layer names of RCAN's authors, which differ from BasicSR's.
_RCAN_NAMES = [
    (r'conv_first\.', 'head.0.'),
    (r'body\.(\d+)\.residual_group\.(\d+)\.rcab\.3\.attention\.1\.', r'body.\1.body.\2.body.3.conv_du.0.'),
    (r'body\.(\d+)\.residual_group\.(\d+)\.rcab\.3\.attention\.3\.', r'body.\1.body.\2.body.3.conv_du.2.'),
    (r'body\.(\d+)\.residual_group\.(\d+)\.rcab\.', r'body.\1.body.\2.body.'),
    (r'body\.(\d+)\.conv\.', r'body.\1.body.{num_block}.'),
    (r'conv_after_body\.', 'body.{num_group}.'),
    (r'upsample\.', 'tail.0.'),
    (r'conv_last\.', 'tail.1.'),
]
_RCAN_RANGE = 255
# Largest accepted difference between original and exported network, for images in [0, 1].
_TOLERANCE = 1e-4


def require_other_file(path: str, weights: str) -> None:
    """Raise DataError if an export would overwrite the weights."""
    if Path(path).resolve() == Path(weights).resolve():
        raise DataError(f'{path} is the weights file; choose another name.')


def export_onnx(network: TrainedNetwork, path: str) -> float:
    """Write a network as ONNX, for images of any size, and compare it in onnxruntime at three sizes.

    Args:
        network (TrainedNetwork): Maps ``lq``, RGB in [0, 1], ``(1, 3, h, w)``, h and w multiples of
            ``network.window``, to ``restored``, ``(1, 3, scale · h, scale · w)``, not clipped.
        path (str): The file to write; includes the weights.

    Returns:
        float: Largest difference between the outputs of network and file.

    Raises:
        OptionError: If a required package is missing.
        DataError: If the network cannot be exported, or its results differ.
    """
    for module in ('onnx', 'onnxscript', 'onnxruntime'):
        try:
            importlib.import_module(module)
        except ImportError:
            raise OptionError(
                f"basicsr export needs {module}; install it with: pip install 'drtl_plugin[export]'"
            ) from None
    import onnxruntime

    window = network.window
    side = window * -(-48 // window)
    unfinished = Path(f'{path}.unfinished')
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    # Sides are multiples of the window.
    sizes = {2 + i: window * torch.export.Dim(name, min=2) for i, name in enumerate(('rows', 'columns'))}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.onnx.export(
                network.net,
                (torch.rand(1, 3, side, side + window),),
                str(unfinished),
                dynamo=True,
                dynamic_shapes=(sizes,),
                input_names=['lq'],
                output_names=['restored'],
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the tracer raises many kinds of errors
        unfinished.unlink(missing_ok=True)
        line = ' '.join(str(error).split())[:300]
        raise DataError(f'{network.options["type"]} cannot be exported as ONNX ({line}).') from None
    session = onnxruntime.InferenceSession(str(unfinished), providers=['CPUExecutionProvider'])
    generator = torch.Generator().manual_seed(0)
    differences = []
    for rows, columns in ((side, side), (2 * side, side + window), (side + 2 * window, 3 * side)):
        lq = torch.rand(1, 3, rows, columns, generator=generator)
        with torch.no_grad():
            wanted = network.net(lq).numpy()
        differences.append(float(np.abs(session.run(None, {'lq': lq.numpy()})[0] - wanted).max()))
    if not max(differences) <= _TOLERANCE:
        unfinished.unlink()
        raise DataError(f'{path}: the exported network differs from the original by {max(differences):.2g}.')
    os.replace(unfinished, path)
    return max(differences)


def export_spandrel(network: TrainedNetwork, path: str) -> None:
    """Write weights with the layer names by which spandrel recognises the network; only RCAN's names change.

    Args:
        network (TrainedNetwork): The network.
        path (str): The file to write: ``.safetensors``, with network, scale, version and adaptation as metadata, or
            another, with the weights under ``params``.

    Raises:
        OptionError: For an RCAN with a ``res_scale`` other than 1, which the weights don't record.
    """
    weights = network.net.state_dict()
    if network.options['type'] == 'RCAN':
        weights = _rcan_weights(network, weights)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix == '.safetensors':
        checkpoints.save_safetensors(weights, network.record(), path)
    else:
        checkpoints.save({'params': weights}, path)


def _rcan_weights(network: TrainedNetwork, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if network.options.get('res_scale', 1) != 1:
        raise OptionError(f'network_g.res_scale: spandrel assumes 1, but it is {network.options["res_scale"]}.')
    rcan: Any = network.net
    counts = {'num_group': len(rcan.body), 'num_block': len(rcan.body[0].residual_group)}
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in _RCAN_NAMES:
            if re.match(pattern, name):
                name = re.sub(pattern, replacement.format(**counts), name)
                break
        renamed[name] = weight
    # The authors' network works on values in [0, 255].
    factor = rcan.img_range / _RCAN_RANGE
    renamed['head.0.weight'] = renamed['head.0.weight'] * factor
    for name in ('tail.1.weight', 'tail.1.bias'):
        renamed[name] = renamed[name] / factor
    mean = _RCAN_RANGE * rcan.mean.flatten()
    for name, sign in (('sub_mean', -1), ('add_mean', 1)):
        renamed[f'{name}.weight'] = torch.eye(len(mean))[..., None, None]
        renamed[f'{name}.bias'] = sign * mean
    return renamed
