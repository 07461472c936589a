"""Evaluation on held-out pairs: each is restored by a network that was adapted to the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from basicsr.metrics import calculate_metric
from basicsr.utils import tensor2img
from torch import nn

from drtl_plugin.api.adapt_pairs import Pair
from drtl_plugin.models.cross_validation import CrossValidation, Part
from drtl_plugin.report.html import Comparison
from drtl_plugin.report.pictures import compared_crop
from drtl_plugin.runtime.progress import progress
from drtl_plugin.runtime.tiles import restore
from drtl_plugin.runtime.trained_network import TrainedNetwork

_TILE = 512
_METRICS = {'psnr_y': 'calculate_psnr', 'ssim_y': 'calculate_ssim'}


@dataclass(frozen=True)
class Evaluation:
    """A held-out pair, or part of one, restored before and after adaptation to the others.

    Attributes:
        name (str): Name of the pair, and number of the part.
        before, after (dict[str, float]): ``psnr_y`` (dB) and ``ssim_y``.
        comparison (Comparison): Crops of the restored images.
    """

    name: str
    before: dict[str, float]
    after: dict[str, float]
    comparison: Comparison


def evaluate_folds(
    cross_validation: CrossValidation, images: Mapping[str, Pair], network: TrainedNetwork
) -> Iterator[Evaluation]:
    """Restore each pair, or part of one, by the network of the fold that held it out.

    Args:
        cross_validation (CrossValidation): The adaptation.
        images (Mapping[str, Pair]): The pairs, by name.
        network (TrainedNetwork): The network before adaptation.
    """
    nets = cross_validation.networks
    parts = [(part, net) for fold, net in zip(cross_validation.folds, nets, strict=True) for part in fold]
    parts.sort(key=lambda item: (item[0].pair, item[0].top, item[0].left))
    names = _names([part for part, _ in parts], list(images))
    pairs = list(images.values())
    before_net = network.net.to(next(nets[0].parameters()).device)
    for name, (part, net) in progress(zip(names, parts, strict=True), 'evaluation', len(parts), 'image'):
        gt, lq = pairs[part.pair]
        gt, lq = gt[part.region(network.scale)], lq[part.region(1)]
        before, after = (_restored(each, lq, network) for each in (before_net, net))
        crops = [compared_crop(name, restored, gt) for restored in (before, after)]
        comparison = Comparison(name, crops[0].result, crops[1].result, crops[0].gt)
        yield Evaluation(name, _metrics(before, gt, network), _metrics(after, gt, network), comparison)


def _names(parts: Sequence[Part], pairs: Sequence[str]) -> list[str]:
    """The names of the pairs, numbered where a pair has several parts."""
    if len(parts) == len(pairs):
        return [pairs[part.pair] for part in parts]
    numbers = [1 + sum(other.pair == part.pair for other in parts[:i]) for i, part in enumerate(parts)]
    return [f'{pairs[part.pair]} ({number})' for part, number in zip(parts, numbers, strict=True)]


def _restored(net: nn.Module, lq: np.ndarray, network: TrainedNetwork) -> np.ndarray:
    device = next(net.parameters()).device
    tensor = torch.from_numpy(lq[..., ::-1].transpose(2, 0, 1).astype(np.float32) / 255)[None].to(device)
    return tensor2img(restore(net.eval(), tensor, network.scale, network.window, _TILE))


def _metrics(restored: np.ndarray, gt: np.ndarray, network: TrainedNetwork) -> dict[str, float]:
    options = {'crop_border': network.scale, 'test_y_channel': True}
    return {
        name: float(calculate_metric({'img': restored, 'img2': gt}, {'type': kind, **options}))
        for name, kind in _METRICS.items()
    }


def evaluation_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Cells of a table: name, PSNR-Y before and after (dB), SSIM-Y before and after; the last row is the mean."""
    rows = [(e.name, e.before, e.after) for e in evaluations]
    before, after = (
        {key: float(np.mean([getattr(e, side)[key] for e in evaluations])) for key in _METRICS}
        for side in ('before', 'after')
    )
    return [
        [name, *(f'{metrics[key]:.{d}f}' for key, d in (('psnr_y', 2), ('ssim_y', 4)) for metrics in (first, second))]
        for name, first, second in [*rows, ('mean', before, after)]
    ]


def mean_gain(evaluations: Sequence[Evaluation]) -> float:
    """Mean gain in PSNR-Y, in dB."""
    return float(np.mean([e.after['psnr_y'] - e.before['psnr_y'] for e in evaluations]))


def evaluation_table(evaluations: Sequence[Evaluation], share: float) -> list[str]:
    """Markdown lines: the table, and whether adaptation helps.

    Args:
        evaluations (Sequence[Evaluation]): The pairs.
        share (float): The share that cross-validation chose.
    """
    lines = ['Each pair, or part of a pair, restored by a network adapted to the others (luma; PSNR in dB):', '']
    lines += ['| pair | PSNR before | PSNR after | SSIM before | SSIM after |', '|---|---|---|---|---|']
    *rows, mean = evaluation_rows(evaluations)
    lines += [f'| {" | ".join(row)} |' for row in [*rows, ['**mean**', *mean[1:]]]]
    gain = mean_gain(evaluations)
    if share == 0:
        verdict = 'Adapting gains nothing on held-out pairs, so the weights stay as they were.'
    elif gain > 0:
        verdict = f'Adapting gains {gain:.2f} dB.'
    else:
        verdict = f'Adapting loses {-gain:.2f} dB of PSNR, although the loss that it was trained with falls.'
    return [*lines, '', verdict]
