"""The DRN of a run: built from ``network_r``, or the one that the package ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from basicsr.archs import build_network
from torch import nn

from drtl_plugin import archs
from drtl_plugin.errors import OptionError
from drtl_plugin.options.sections import DRTLOptions
from drtl_plugin.relation.estimators import needs_drn, shipped_drn


def load_shipped(architecture: str) -> nn.Module:
    """The DRN of an architecture with its shipped weights, on the CPU, in evaluation mode."""
    net_r = build_network({'type': architecture}).eval()
    path = Path(archs.__file__).with_name(f'{architecture}.pth')
    net_r.load_state_dict(torch.load(path, map_location='cpu', weights_only=True)['params'])
    return net_r


def build_relation_net(opt: dict[str, Any], drtl: DRTLOptions, device: torch.device) -> tuple[nn.Module | None, bool]:
    """Build the DRN that ``drtl.weighting.relation`` needs.

    ``network_r`` together with ``path.pretrain_network_r`` replaces a DRN that is shipped.

    Returns:
        tuple[nn.Module | None, bool]: The DRN in evaluation mode, or None if the relation needs none or ``network_r``
        is missing; and whether it has weights, either shipped or, to be loaded by the caller, those of
        ``path.pretrain_network_r``.

    Raises:
        OptionError: If the relation's DRN is shipped, and ``network_r`` names one that is not trained, or that does not
            predict gains.
    """
    relation, options = drtl.weighting.relation, opt.get('network_r')
    given = opt['path'].get('pretrain_network_r') is not None
    if not needs_drn(relation):
        return None, given
    shipped = shipped_drn(relation)
    if shipped is None:
        return (None if options is None else build_network(options).to(device).eval()), given
    if options is None and not given:
        return load_shipped(shipped).to(device), True
    if options is None or not given:
        raise OptionError(
            f'network_r: relation {relation!r} has a trained DRN of its own; remove network_r and '
            'path.pretrain_network_r, or give both for another one.'
        )
    net_r = build_network(options).to(device).eval()
    if not hasattr(net_r, 'gains'):
        raise OptionError(f'network_r.type: relation {relation!r} needs a DRN that predicts gains, e.g. {shipped}.')
    return net_r, True
