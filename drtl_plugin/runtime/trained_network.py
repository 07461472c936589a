"""Reading trained networks from files of weights."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from drtl_plugin.errors import DataError, OptionError, describe, own_line, registered
from drtl_plugin.options.convert import number
from drtl_plugin.options.file import load_option_file
from drtl_plugin.runtime import checkpoints
from drtl_plugin.runtime.device import lay_out
from drtl_plugin.runtime.recognition import SPANDREL_NETWORK, recognise, spandrel_options

# Where weights are looked for, in this order; None: weights without a key.
_KEYS = ('params_ema', 'params', None)


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A network with its weights.

    Attributes:
        net (nn.Module): In evaluation mode, on the CPU.
        options (dict): ``network_g`` of the option file: its type and arguments.
        scale (int): Scale of the network.
        param_key (str | None): Key of the weights in their file; None: no key.
        losses (tuple[str, ...] | None): Losses that it was trained with, e.g. ``('pixel',)``; None: unknown.
        adaptation (dict | None): Record of its adaptation, if there was one.
    """

    net: nn.Module
    options: dict
    scale: int
    param_key: str | None = None
    losses: tuple[str, ...] | None = None
    adaptation: dict | None = None

    def record(self) -> dict[str, Any]:
        """What a checkpoint records of the network."""
        network = {key: value for key, value in self.options.items() if key != 'checkpoint'}
        record = {
            'architecture': type(self.net).__name__,
            'network': network,
            'scale': self.scale,
            'losses': self.losses,
            'adaptation': self.adaptation,
        }
        return {key: value for key, value in record.items() if value is not None}

    @property
    def may_be_of_gan(self) -> bool:
        """Whether it may have been trained with a GAN or perceptual loss; a pixel loss would then blur its results."""
        return self.losses is None or not {'gan', 'perceptual'}.isdisjoint(self.losses)

    @property
    def window(self) -> int:
        """Height and width of the input must be multiples of this."""
        return input_multiple(self.options, self.scale)


def input_multiple(options: dict, scale: int) -> int:
    """The number that height and width of a network's input must be multiples of.

    Args:
        options (dict): ``network_g``.
        scale (int): Scale of the network.
    """
    if options['type'] == 'RRDBNet' and scale < 4:
        return 4 // scale  # it starts with pixel_unshuffle
    return options.get('window_size', 1)


def load_trained(path: str, option_file: str | None = None) -> TrainedNetwork:
    """Build the network of a file of weights.

    Architecture and scale come from the option file if one is given, else from the checkpoint (if this plug-in wrote
    it), else from the option file of the experiment that contains the weights in its ``models`` folder. Without any of
    these, spandrel recognises many architectures by their weights.

    Args:
        path (str): ``.pth``, ``.ckpt`` or ``.safetensors``. Weights under ``params_ema`` or ``params``, or without a
            key; also under others where spandrel recognises them.
        option_file (str | None): Option file with ``network_g`` and ``scale``.

    Raises:
        DataError: If the weights cannot be read, or belong to another network.
        OptionError: If the network is not known, or cannot be built.
    """
    content = checkpoints.read(path, '--weights')
    described = _description(content, path, option_file)
    if described is None or (isinstance(described[0], dict) and described[0].get('type') == SPANDREL_NETWORK):
        return _recognised(content, path)
    network, scale, where = described
    key, weights = checkpoints.weights_in(content, path, '--weights', _KEYS)
    if not isinstance(network, dict) or 'type' not in network:
        raise OptionError(f'{where}: network_g: expected a section with a type.')
    registered(ARCH_REGISTRY, network['type'], 'network', f'{where}: network_g.type')
    try:
        net = build_network(network)
    except Exception as error:
        line = f'{describe(error)}{own_line(error)}'
        raise OptionError(f'{where}: network_g: {network["type"]} cannot be built: {line}') from error
    fault = f'--weights: {path} does not fit the network_g of {where}'
    checkpoints.load_weights(net, weights, content, network, fault)
    lay_out(net.eval(), torch.channels_last)
    trained = TrainedNetwork(net, network, scale, key, **_history(content))
    _rehearse(trained, where)
    return trained


def _history(content: dict) -> dict[str, Any]:
    """What a checkpoint of ours records of its training."""
    losses, adaptation = content.get('losses'), content.get('adaptation')
    return {
        'losses': tuple(losses) if isinstance(losses, list) else None,
        'adaptation': adaptation if isinstance(adaptation, dict) else None,
    }


def _recognised(content: Any, path: str) -> TrainedNetwork:
    """The network of a checkpoint that spandrel recognises.

    Raises:
        OptionError: If it does not.
        DataError: If there are no weights, or their network cannot be trained.
    """
    found = recognise(content, f'--weights: {path}')
    if found is None:
        checkpoints.weights_in(content, path, '--weights', _KEYS)  # an error if there are none
        raise OptionError(
            f'--weights: {path} does not record its network, and spandrel does not recognise it; give its option file '
            'with -opt.'
        )
    lay_out(found.net, torch.channels_last)
    options = spandrel_options(path, found.window)
    return TrainedNetwork(found.net, options, found.scale, **_history(content))


def _rehearse(trained: TrainedNetwork, where: str) -> None:
    """Restore a small grey image, since weights may also fit a network of another scale.

    Raises:
        DataError: If this fails, or the result has another size or is not finite.
    """
    side = trained.window * -(-24 // trained.window)
    try:
        with torch.no_grad():
            result = trained.net(torch.full((1, 3, side, side), 0.5))
        width = result.shape[-1]
    except Exception as error:
        line = f'{describe(error)}{own_line(error)}'
        raise DataError(f'{where}: the network cannot restore colour images: {line}') from error
    if width != side * trained.scale:
        raise DataError(f'{where}: scale is {trained.scale}, but the network enlarges {width / side:g} times.')
    if not result.isfinite().all():
        raise DataError(
            f'{where}: the network returns infinite values or NaN for a grey image; its weights are damaged.'
        )


def _description(content: Any, path: str, option_file: str | None) -> tuple[dict, int, str] | None:
    """``network_g``, scale, and the file that contains them; None if there is none."""
    if option_file is None and isinstance(content, dict) and isinstance(content.get('network'), dict):
        return content['network'], _scale(content, path), path
    if option_file is not None:
        opt = load_option_file(option_file)
        if not isinstance(opt.get('network_g'), dict):
            raise OptionError(f'{option_file}: expected an option file with network_g and scale.')
        return opt['network_g'], _scale(opt, option_file), option_file
    for file in sorted(Path(path).absolute().parent.parent.glob('*.yml')):
        with contextlib.suppress(OptionError):  # not an option file
            opt = load_option_file(str(file))
            if isinstance(opt.get('network_g'), dict):
                return opt['network_g'], _scale(opt, str(file)), str(file)
    return None


def _scale(opt: dict, where: str) -> int:
    return number(opt.get('scale', 1), int, f'{where}: scale', 1)
