"""From a folder of pairs and trained weights to weights of one's own camera: the whole of ``basicsr adapt``."""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from basicsr.metrics import calculate_metric
from basicsr.models import build_model
from basicsr.utils import tensor2img
from torch import nn

from drtl_plugin import preflight
from drtl_plugin.compat.basicsr import close_basicsr_logs, quiet_basicsr_log
from drtl_plugin.data.image_files import image_names, image_size, read_image
from drtl_plugin.data.photographs import has_16_bits, require_same_profile
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.losses.command_line import loss_sections
from drtl_plugin.models.drtl_model import DRTLModel
from drtl_plugin.options.parse import parse_options
from drtl_plugin.report.html import (
    Comparison,
    Curves,
    Page,
    Table,
    illustrate,
    illustrations_of_folder,
    write_html,
)
from drtl_plugin.report.pictures import draw_graph
from drtl_plugin.report.tables import (
    Gain,
    busiest,
    command_line,
    compared_crop,
    duration_in_words,
    network_in_words,
    relation_table,
    write_graph,
)
from drtl_plugin.runtime.progress import progress
from drtl_plugin.runtime.tiles import restore
from drtl_plugin.runtime.weights import TrainedNetwork, load_trained
from drtl_plugin.sources.alignment import Alignment, estimate_alignment, find_pairs, register

# Low-quality pixels that the images of a pair may lie apart, in their worst corner, if they are not registered.
_APART = 2
# How far the ratio of GT to LQ size may be from a whole number to count as the scale of the pair.
_NEARLY = 0.1
# How far the measured scale of a pair whose sizes fit another scale may be from that of the weights, as a share.
_ZOOM = 0.1
# Side of the low-quality patches, where the photographs are large enough.
_LQ_SIZE = 48
_TILE = 512
# What the sides of patches must be multiples of for a discriminator that halves them three times.
_HALVED = 8
# Side of the part of a low-quality image that the course of adaptation is judged by, and how often.
_DETAIL, _LOOKS = 64, 9
_METRICS = {'psnr_y': 'calculate_psnr', 'ssim_y': 'calculate_ssim'}


@dataclass(frozen=True)
class Evaluation:
    """A pair, restored by networks that have not seen it.

    Attributes:
        name (str): Of the pair.
        before (dict[str, float]): Metrics of the network that was given.
        after (dict[str, float]): Of the one that was adapted to the other pairs.
        comparison (Comparison): Crops of the restored images.
        course (list[tuple[float, float]]): Steps of adaptation, and PSNR-Y then, of the part with most detail.
    """

    name: str
    before: dict[str, float]
    after: dict[str, float]
    comparison: Comparison
    course: list[tuple[float, float]]


def adapt(
    pairs_folder: str,
    weights: str,
    output: str,
    option_file: str | None = None,
    auxiliary: str | None = None,
    steps: int = 200,
    registers: bool = False,
    evaluates: bool = True,
    modules: Sequence[str] = (),
    losses: Sequence[str] = (),
) -> str:
    """Find pairs, check how they lie upon each other, adapt, judge by leaving each pair out, and write what came of it.

    ``output`` gets ``pairs/gt`` and ``pairs/lq``, ``adapt.yml`` (``basicsr train -opt`` repeats the adaptation),
    ``net_g_adapted_latest.pth``, ``knowledge_graph.png`` and ``.json``, and ``report.md`` and ``.html``.

    Args:
        pairs_folder (str): See :func:`~drtl_plugin.sources.alignment.find_pairs`.
        weights (str), option_file (str | None): See :func:`~drtl_plugin.runtime.weights.load_trained`.
        output (str): Folder to write, which must not be there, or be empty.
        auxiliary (str | None): Folder of good photographs for the auxiliary tasks; by default, those of the pairs.
        steps (int): Steps of adaptation.
        registers (bool): Lay each ground truth upon its low-quality image first.
        evaluates (bool): Adapt once more for each pair, to the others, and judge by it.
        modules (Sequence[str]): Modules that were imported by ``--import``; the commands in the report need them, too.
        losses (Sequence[str]): See :func:`~drtl_plugin.losses.command_line.loss_sections`; none: the pixel loss.

    Returns:
        str: The report, in Markdown.

    Raises:
        DataError: If there are no pairs, or they don't fit.
        OptionError: If weights or arguments make no sense.
    """
    if steps < 1:
        raise OptionError('--steps must be at least 1.')
    began = time.monotonic()
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f'-o: {output} is there already; choose another folder.')
    if auxiliary is not None:
        image_names(auxiliary, '--auxiliary')
    sections = loss_sections(losses or ['pixel=1'])
    close_basicsr_logs()
    network = load_trained(weights, option_file)
    if not losses and network.may_be_of_gan:
        print(
            f'basicsr: warning: {weights} may have been trained with a GAN, whose texture the default pixel loss '
            'smooths; --loss pixel=1 msssim=0.2 smooths less, --loss pixel=1 is the default without this warning.',
            file=sys.stderr,
        )
    found = find_pairs(pairs_folder, network.scale)
    lines = [f'# {len(found)} pairs of {pairs_folder}', '']
    lines += ['Where the poor photograph lies in the good one, in its pixels:', '']
    lines += ['| pair | right | down | scale | correlation |', '|---|---|---|---|---|']
    images = {}
    for name, alignment, pair in _aligned(found, network.scale, registers):
        lines.append(_alignment_row(name, alignment))
        images[name] = pair
    if any(has_16_bits(path) for paths in found.values() for path in paths):
        lines += ['', '16-bit photographs were reduced to 8 bits, since BasicSR trains on 8 bits.']
    # BasicSR's logger tells what it builds; here that would be once for each pair.
    with quiet_basicsr_log(logging.INFO):
        try:
            opt, model = _adapt_to_all(network, weights, images, target, auxiliary, steps, sections)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        lines += ['', '## Which synthetic distortions the camera is like', '', '```']
        lines += [relation_table(model.graph, model.weights), '```', '', '## What the pairs are worth', '']
        evaluations, unmeasured = [], ''
        if evaluates and len(images) > 1:
            try:
                evaluations = list(_leave_one_out(opt, images, network))
            except BaseException:  # what was adapted is there, and whole
                lines.append('Not measured: it failed.')
                (target / 'report.md').write_text('\n'.join([*lines, '']), encoding='utf-8')
                raise
            lines += _evaluation_lines(evaluations)
        else:
            unmeasured = 'there is only one pair' if len(images) == 1 else '--no-evaluation'
            lines.append(f'Not measured: {unmeasured}.')
    lines += ['', '## What to do next', '']
    adapted = target / 'net_g_adapted_latest.pth'
    restoring = command_line('upscale', '-i', 'IN', '-o', 'OUT', '--weights', adapted, modules=modules)
    repeating = command_line('train', '-opt', target / 'adapt.yml', modules=modules)
    lines += [f'- Restore photographs: `{restoring}`', f'- Repeat it, or change what was chosen: `{repeating}`']
    report = '\n'.join(lines) + '\n'
    (target / 'report.md').write_text(report, encoding='utf-8')
    duration = duration_in_words(time.monotonic() - began)
    _write_page(target, report, evaluations, unmeasured, network, model, duration)
    return report


def _aligned(
    found: dict[str, tuple[Path, Path]], scale: int, registers: bool
) -> Iterator[tuple[str, Alignment, tuple[np.ndarray, np.ndarray]]]:
    """Name, alignment and images ``(gt, lq)`` of each pair.

    Raises:
        DataError: If a pair does not fit, with the likely reason.
    """
    for name, paths in progress(found.items(), 'alignment', len(found), 'pair'):
        gt, lq = (read_image(path) for path in paths)
        require_same_profile(*paths)
        fits = all(good == scale * poor for good, poor in zip(gt.shape[:2], lq.shape[:2]))
        if scale > 1:
            _require_order(*paths, gt, lq)
        other_scale = _other_scale(*paths, gt, lq, scale)
        if not fits and not registers:
            raise DataError(
                other_scale
                or f'{paths[1]} is {lq.shape[1]}x{lq.shape[0]}, so {paths[0]} should be {scale} times as large, not '
                f'{gt.shape[1]}x{gt.shape[0]}; --register crops both to what they share.'
            )
        alignment = estimate_alignment(lq, gt, scale)
        # A cropped GT may fit another scale by chance; then the pair still aligns at the scale of the weights.
        if other_scale is not None and (alignment.is_hopeless or abs(alignment.scale - 1) > _ZOOM):
            raise DataError(other_scale)
        if alignment.is_hopeless:
            raise DataError(
                f'{paths[0]} and {paths[1]} do not show the same (correlation {alignment.correlation:.2f}); remove '
                'them.'
            )
        if registers:
            try:
                lq, gt = register(lq, gt, scale, alignment)
            except DataError as error:
                raise DataError(f'{paths[0]} and {paths[1]}: {error}') from None
        elif alignment.displacement > _APART:
            raise DataError(
                f'{paths[0]} and {paths[1]} lie up to {alignment.displacement:.1f} low-quality pixels apart; put them '
                'right by --register, or remove them.'
            )
        yield name, alignment, (gt, lq)


def _require_order(gt_path: Path, lq_path: Path, gt: np.ndarray, lq: np.ndarray) -> None:
    """Raise DataError if the LQ image is clearly larger than the GT image, which registration cannot fix."""
    if all(good < (1 - _NEARLY) * poor for good, poor in zip(gt.shape[:2], lq.shape[:2])):
        same = gt_path.parent == lq_path.parent
        what = 'files' if same else f'folders {gt_path.parent} and {lq_path.parent}'
        raise DataError(
            f'--pairs: {lq_path}, the LQ, is {lq.shape[1]}x{lq.shape[0]}, larger than {gt_path}, its GT, of '
            f'{gt.shape[1]}x{gt.shape[0]}; are the {what} swapped?'
        )


def _other_scale(gt_path: Path, lq_path: Path, gt: np.ndarray, lq: np.ndarray, scale: int) -> str | None:
    """The error message for a pair whose width and height both fit another scale than that of the weights."""
    ratios = [good / poor for good, poor in zip(gt.shape[:2], lq.shape[:2])]
    found = round(ratios[0])
    if found in (0, scale) or any(abs(ratio - found) > _NEARLY for ratio in ratios):
        return None
    return (
        f'--pairs: {gt_path} is {gt.shape[1]}x{gt.shape[0]}, {lq_path} is {lq.shape[1]}x{lq.shape[0]}: these pairs are '
        f'x{found}, the weights are for x{scale}; use weights for x{found}, or pairs for x{scale}.'
    )


def _alignment_row(name: str, alignment: Alignment) -> str:
    right, down = alignment.shift
    return f'| {name} | {right:+.2f} | {down:+.2f} | {alignment.scale:.4f} | {alignment.correlation:.3f} |'


def _adapt_to_all(
    network: TrainedNetwork,
    weights: str,
    images: dict[str, tuple[np.ndarray, np.ndarray]],
    target: Path,
    auxiliary: str | None,
    steps: int,
    sections: dict[str, dict],
) -> tuple[dict, DRTLModel]:
    """Write pairs, option file, weights and graph; returns the parsed options and the model."""
    _write_pairs(images, target / 'pairs')
    opt_path = target / 'adapt.yml'
    content = yaml.safe_dump(_options(network, weights, images, target, auxiliary, steps, sections), sort_keys=False)
    opt_path.write_text(content, encoding='utf-8')
    args = argparse.Namespace(opt=str(opt_path), launcher='none', auto_resume=False, debug=False, force_yml=None)
    opt = parse_options(args, os.getcwd(), is_train=True)
    preflight.check(opt)
    opt['path'].update(experiments_root=str(target), models=str(target))
    model = _adapted_model(opt, list(images))
    model.save_network(model.net_g_adapted, 'net_g_adapted', -1)
    write_graph(model.graph, target / 'knowledge_graph.json', model.weights)
    draw_graph(model.graph, target / 'knowledge_graph.png', model.weights, model.fit_share)
    return opt, model


def _write_pairs(images: dict[str, tuple[np.ndarray, np.ndarray]], folder: Path) -> None:
    for i, side in enumerate(('gt', 'lq')):
        (folder / side).mkdir(parents=True)
        for name, pair in images.items():
            (folder / side / f'{name}.png').write_bytes(cv2.imencode('.png', pair[i])[1].tobytes())


def _options(
    network: TrainedNetwork,
    weights: str,
    images: dict[str, tuple[np.ndarray, np.ndarray]],
    target: Path,
    auxiliary: str | None,
    steps: int,
    sections: dict[str, dict],
) -> dict:
    """The option file of the adaptation, with those sections that say which losses it has."""
    scale = network.scale
    pairs = target.absolute() / 'pairs'
    photographs = pairs / 'gt' if auxiliary is None else Path(auxiliary).absolute()
    sizes = [image_size(str(photographs / name)) for name in image_names(str(photographs), '--auxiliary')]
    multiple = scale
    if 'network_d' in sections:  # a U-Net, which takes no other patches
        multiple = math.lcm(scale, _HALVED)
        sizes += [gt.shape[:2] for gt, _ in images.values()]
    gt_size = min(_LQ_SIZE * scale, min(min(size) for size in sizes)) // multiple * multiple
    return {
        'name': _free_name(target.absolute().name),
        'model_type': 'DRTLAdaptModel',
        'scale': scale,
        'num_gpu': 'auto',
        'manual_seed': 0,
        'datasets': {
            'train': {
                'name': 'auxiliary tasks',
                'type': 'DistortionTaskDataset',
                'dataroot_gt': str(photographs),
                'io_backend': {'type': 'disk'},
                'gt_size': gt_size,
                'distortions': 'default',
                'target': {
                    'dataroot_gt': str(pairs / 'gt'),
                    'dataroot_lq': str(pairs / 'lq'),
                    'names': list(images),
                },
            }
        },
        'network_g': network.options,
        'drtl': {
            'weighting': {'relation': 'transfer', 'effective_tasks': 6, 'floor': 0.2},
            'adapt': {'steps': steps, 'lr': 3e-4, 'batch_size': 8, 'replay': 0.5},
        },
        'path': {
            'pretrain_network_g': str(Path(weights).absolute()),
            'param_key_g': network.param_key,
            'strict_load_g': True,
            **sections['path'],
        },
        **{key: section for key, section in sections.items() if key != 'path'},
    }


def _free_name(name: str) -> str:
    """The name itself, or with a number appended, such that experiments/ has no folder of this name yet.

    Repeating the adaptation under a name in use would archive that folder, which may hold its option file or weights.
    """
    names = itertools.chain([name], (f'{name}_{number}' for number in itertools.count(2)))
    return next(free for free in names if not Path('experiments', free).exists())


def _adapted_model(
    opt: dict,
    names: Sequence[str],
    auxiliary: str | None = None,
    watch: Callable[[int, nn.Module], None] | None = None,
) -> DRTLModel:
    """A model that was adapted to the pairs of these names; its auxiliary photographs may be of another folder."""
    opt = copy.deepcopy(opt)
    opt['datasets']['train']['target']['names'] = list(names)
    if auxiliary is not None:
        opt['datasets']['train']['dataroot_gt'] = auxiliary
    model = build_model(opt)
    model.start()
    model.adapt_to_target(watch)
    return model


def _leave_one_out(
    opt: dict, images: dict[str, tuple[np.ndarray, np.ndarray]], network: TrainedNetwork
) -> Iterator[Evaluation]:
    """Adapt to all pairs but one, whose good photograph is no auxiliary one either, and restore that one.

    The relation, most of the work, is not measured again for each: what the camera fit leaves of the weights is spread
    evenly.
    """
    opt = copy.deepcopy(opt)
    opt['drtl']['weighting']['relation'] = 'uniform'
    steps = opt['drtl']['adapt']['steps']
    looks = {round(steps * share**2) for share in np.linspace(0, 1, _LOOKS)}  # most changes in the beginning
    for name in progress(images, 'leaving one out', len(images), 'pair'):
        others = [other for other in images if other != name]
        gt, lq = images[name]
        detail = _detail(gt, lq, network.scale)
        course: list[tuple[float, float]] = []

        def watch(step: int, net: nn.Module, detail=detail, course=course) -> None:
            if step in looks:
                course.append((step, _metrics(_restored(net, detail[1], network), detail[0], network)['psnr_y']))

        with tempfile.TemporaryDirectory() as folder:
            photographs = Path(folder, 'photographs')
            photographs.mkdir()
            _link_others(Path(opt['datasets']['train']['dataroot_gt']), photographs, gt)
            path = {**opt['path'], 'experiments_root': folder, 'models': folder}
            model = _adapted_model({**opt, 'path': path}, others, str(photographs), watch)
        before, after = (_restored(net, lq, network) for net in (network.net.to(model.device), model.net_g_adapted))
        metrics = (_metrics(restored, gt, network) for restored in (before, after))
        crops = [compared_crop(name, restored, gt) for restored in (before, after)]
        comparison = Comparison(name, *(crop.result for crop in crops), crops[0].gt)
        yield Evaluation(name, *metrics, comparison, course)


def _link_others(source: Path, target: Path, held_out: np.ndarray) -> None:
    """Put all photographs of a folder into another one, but those that show what is held out, pixel for pixel."""
    for name in image_names(str(source), 'auxiliary photographs'):
        path = source / name
        if image_size(str(path)) == held_out.shape[:2] and np.array_equal(read_image(path), held_out):
            continue
        try:
            os.symlink(path, target / name)
        except OSError:  # Windows asks for a right
            shutil.copy(path, target / name)


def _detail(gt: np.ndarray, lq: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of a pair with most detail."""
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


def _write_page(
    target: Path,
    report: str,
    evaluations: Sequence[Evaluation],
    unmeasured: str,
    network: TrainedNetwork,
    model: DRTLModel,
    duration: str,
) -> None:
    """Write ``report.html``."""
    gains, tables, illustrations = [], [], []
    if evaluations:
        against = f'after adaptation, compared with before (mean of {len(evaluations)} pairs)'
        gains = [Gain(f'{_gain(evaluations):+.2f} dB PSNR-Y', against)]
        columns = ['pair', 'PSNR-Y before (dB)', 'PSNR-Y after (dB)', 'SSIM-Y before', 'SSIM-Y after']
        title = 'Each pair, restored by a network adapted to the others'
        tables = [Table(title, columns, _evaluation_rows(evaluations))]
        caption = 'Each line is a pair, restored by a network that is adapted to the other pairs only.'
        courses = {evaluation.name: evaluation.course for evaluation in evaluations}
        curves = Curves('PSNR during adaptation', 'steps', 'PSNR-Y of the crop in dB', courses, caption)
        illustrations = [illustrate(curves)]
    page = Page(
        target.absolute().name,
        gains,
        unmeasured,
        {
            'Network': network_in_words(network.options, network.net),
            'Adaptation': f'{model.drtl.adapt.steps} steps on {len(model.target_pairs)} pairs',
            'Duration': duration,
        },
        tables,
        [evaluation.comparison for evaluation in evaluations],
        [*illustrations, *illustrations_of_folder(target, {}, model.fit_share)],
        {
            'Report as text: report.md': report,
            'Options: adapt.yml': (target / 'adapt.yml').read_text(encoding='utf-8'),
        },
    )
    write_html(target / 'report.html', page)


def _evaluation_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Cells of the table: a row for each pair, and one for their mean."""
    rows = [(e.name, e.before, e.after) for e in evaluations]
    before, after = (
        {key: float(np.mean([getattr(e, side)[key] for e in evaluations])) for key in _METRICS}
        for side in ('before', 'after')
    )
    return [
        [name, *(f'{metrics[key]:.{d}f}' for key, d in (('psnr_y', 2), ('ssim_y', 4)) for metrics in (first, second))]
        for name, first, second in [*rows, ('mean', before, after)]
    ]


def _gain(evaluations: Sequence[Evaluation]) -> float:
    """Mean gain in PSNR-Y, in dB."""
    return float(np.mean([e.after['psnr_y'] - e.before['psnr_y'] for e in evaluations]))


def _evaluation_lines(evaluations: Sequence[Evaluation]) -> list[str]:
    """Markdown lines of the table, and what follows from it."""
    lines = ['Each pair restored by the network that was adapted to the others (on luma; PSNR in dB):', '']
    lines += ['| pair | PSNR before | PSNR after | SSIM before | SSIM after |', '|---|---|---|---|---|']
    *rows, mean = _evaluation_rows(evaluations)
    lines += [f'| {" | ".join(row)} |' for row in [*rows, ['**mean**', *mean[1:]]]]
    gain = _gain(evaluations)
    verdict = f'Adapting gains {gain:.2f} dB.'
    if gain <= 0:
        verdict = f'Adapting loses {-gain:.2f} dB: the pairs teach the network nothing; keep the weights that you had.'
    return [*lines, '', verdict]
