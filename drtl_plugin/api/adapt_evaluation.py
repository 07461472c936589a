"""Leave-one-out evaluation: each pair is restored by a network that was adapted to the others."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from basicsr.metrics import calculate_metric
from basicsr.utils import tensor2img
from torch import nn

from drtl_plugin.api import adapt_model
from drtl_plugin.api.adapt_pairs import Pair
from drtl_plugin.data.image_files import image_names, image_size, read_image
from drtl_plugin.report.html import Comparison
from drtl_plugin.report.pictures import busiest, compared_crop
from drtl_plugin.runtime.progress import progress
from drtl_plugin.runtime.tiles import restore
from drtl_plugin.runtime.trained_network import TrainedNetwork

_TILE = 512
# Side of the LQ crop on which the course of adaptation is measured, and how often.
_DETAIL, _LOOKS = 64, 9
_METRICS = {'psnr_y': 'calculate_psnr', 'ssim_y': 'calculate_ssim'}


@dataclass(frozen=True)
class Evaluation:
    """A held-out pair, restored before and after adaptation to the others.

    Attributes:
        name (str): Name of the pair.
        before, after (dict[str, float]): ``psnr_y`` (dB) and ``ssim_y``.
        comparison (Comparison): Crops of the restored images.
        course (list[tuple[float, float]]): Adaptation steps, and PSNR-Y (dB) of the most detailed crop after them.
    """

    name: str
    before: dict[str, float]
    after: dict[str, float]
    comparison: Comparison
    course: list[tuple[float, float]]


def leave_one_out(opt: dict, images: Mapping[str, Pair], network: TrainedNetwork) -> Iterator[Evaluation]:
    """Adapt to all pairs but one, and restore that one; its GT is not used as an auxiliary image either.

    The relation, which takes most of the time, is not measured again: the camera fit keeps its share of the weight, and
    the other tasks have equal weights.

    Args:
        opt (dict): Parsed options of the adaptation.
        images (Mapping[str, Pair]): The pairs, by name.
        network (TrainedNetwork): The network before adaptation.
    """
    opt = copy.deepcopy(opt)
    opt['drtl']['weighting']['relation'] = 'uniform'
    steps = opt['drtl']['adapt']['steps']
    looks = {round(steps * share**2) for share in np.linspace(0, 1, _LOOKS)}  # most changes come early
    for name in progress(images, 'leaving one out', len(images), 'pair'):
        others = [other for other in images if other != name]
        gt, lq = images[name]
        detail = _detail(gt, lq, network.scale)
        course: list[tuple[float, float]] = []

        def watch(step: int, net: nn.Module, detail=detail, course=course) -> None:
            if step in looks:
                course.append((step, _metrics(_restored(net, detail[1], network), detail[0], network)['psnr_y']))

        with tempfile.TemporaryDirectory() as folder:
            auxiliary = Path(folder, 'auxiliary')
            auxiliary.mkdir()
            _link_others(Path(opt['datasets']['train']['dataroot_gt']), auxiliary, gt)
            path = {**opt['path'], 'experiments_root': folder, 'models': folder}
            model = adapt_model.adapted_model({**opt, 'path': path}, others, str(auxiliary), watch)
        assert model.net_g_adapted is not None
        before = _restored(network.net.to(model.device), lq, network)
        after = _restored(model.net_g_adapted, lq, network)
        crops = [compared_crop(name, restored, gt) for restored in (before, after)]
        comparison = Comparison(name, crops[0].result, crops[1].result, crops[0].gt)
        yield Evaluation(name, _metrics(before, gt, network), _metrics(after, gt, network), comparison, course)


def _link_others(source: Path, target: Path, held_out: np.ndarray) -> None:
    """Link all images of a folder into another one, except those identical to the held-out one."""
    for name in image_names(str(source), '--auxiliary'):
        path = source / name
        if image_size(str(path)) == held_out.shape[:2] and np.array_equal(read_image(path), held_out):
            continue
        try:
            os.symlink(path, target / name)
        except OSError:  # Windows requires a privilege
            shutil.copy(path, target / name)


def _detail(gt: np.ndarray, lq: np.ndarray, scale: int) -> Pair:
    """The most detailed crop of a pair."""
    side = _DETAIL * scale
    top, left = (corner // scale for corner in busiest(gt, side))
    part = gt[top * scale : top * scale + side, left * scale : left * scale + side]
    return part, lq[top : top + _DETAIL, left : left + _DETAIL]


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


def evaluation_table(evaluations: Sequence[Evaluation]) -> list[str]:
    """Markdown lines: the table, and whether adaptation helps."""
    lines = ['Each pair, restored by a network adapted to the others (luma; PSNR in dB):', '']
    lines += ['| pair | PSNR before | PSNR after | SSIM before | SSIM after |', '|---|---|---|---|---|']
    *rows, mean = evaluation_rows(evaluations)
    lines += [f'| {" | ".join(row)} |' for row in [*rows, ['**mean**', *mean[1:]]]]
    gain = mean_gain(evaluations)
    verdict = f'Adapting gains {gain:.2f} dB.'
    if gain <= 0:
        verdict = f'Adapting to these pairs loses {-gain:.2f} dB; keep the old weights.'
    return [*lines, '', verdict]
