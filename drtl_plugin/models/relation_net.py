"""The DRN of a run: built from ``network_r``, or the one that the package ships."""

from __future__ import annotations

import importlib.resources
from typing import Any

import torch
from basicsr.archs import build_network
from torch import nn

from drtl_plugin.options.sections import DRTLOptions
from drtl_plugin.relation.estimators import needs_drn, shipped_drn


def build_relation_net(opt: dict[str, Any], drtl: DRTLOptions, device: torch.device) -> tuple[nn.Module | None, bool]:
    """Build the DRN that ``drtl.weighting.relation`` needs.

    ``network_r`` and ``path.pretrain_network_r`` replace the shipped architecture and its weights.

    Returns:
        tuple[nn.Module | None, bool]: The DRN in evaluation mode, or None if the relation needs none or ``network_r``
        is missing; and whether it has weights, either shipped or, to be loaded by the caller, those of
        ``path.pretrain_network_r``.
    """
    relation = drtl.weighting.relation
    given = opt['path'].get('pretrain_network_r') is not None
    shipped = shipped_drn(relation)
    options = opt.get('network_r') or (shipped and {'type': shipped})
    if not needs_drn(relation) or not options:
        return None, given
    net_r = build_network(options).to(device).eval()
    if shipped == options['type'] and not given:
        file = importlib.resources.files('drtl_plugin.archs') / f'{shipped}.pth'
        with importlib.resources.as_file(file) as path:
            net_r.load_state_dict(torch.load(path, map_location=device, weights_only=True)['params'])
        return net_r, True
    return net_r, given
