"""Trained networks for programs without Python: ONNX."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.trained import TrainedNetwork

# What an exported network may differ by from what it was made of, in units of the full range of an image.
_TOLERANCE = 1e-4


def export_onnx(network: TrainedNetwork, path: str) -> float:
    """Write a network as ONNX, for images of any size, and compare what onnxruntime makes of it, at three sizes.

    Args:
        network (TrainedNetwork): Takes ``lq``, RGB in [0, 1], ``(1, 3, h, w)``, h and w multiples of
            ``network.window``, to ``restored``, ``(1, 3, scale · h, scale · w)``, not clipped.
        path (str): The file to write; weights are in it.

    Returns:
        float: Largest difference between the outputs of network and file.

    Raises:
        OptionError: If a package that this takes is missing.
        DataError: If the network cannot be exported, or the file does something else.
    """
    for module in ('onnx', 'onnxscript', 'onnxruntime'):
        try:
            importlib.import_module(module)
        except ImportError:
            raise OptionError(f"basicsr export needs {module}; pip install 'drtl_plugin[export]' brings it.") from None
    import onnxruntime

    window = network.window
    side = window * -(-48 // window)
    unfinished = Path(f'{path}.unfinished')
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    # In steps of the window.
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
    except Exception as error:  # of any kind, whatever the tracer makes of a network
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
