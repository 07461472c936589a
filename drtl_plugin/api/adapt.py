"""``basicsr adapt``: adapts trained weights to the user's camera, from a folder of pairs."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from drtl_plugin import preflight
from drtl_plugin.api import adapt_model
from drtl_plugin.api.adapt_evaluation import Evaluation, evaluation_rows, evaluation_table, leave_one_out, mean_gain
from drtl_plugin.api.adapt_pairs import Pair, aligned, alignment_table, write_pairs
from drtl_plugin.compat.basicsr import close_basicsr_logs, quiet_basicsr_log
from drtl_plugin.data.image_files import image_names
from drtl_plugin.data.interface import EpisodeDataset
from drtl_plugin.data.photographs import has_16_bits
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.models.drtl_model import DRTLModel
from drtl_plugin.options.parse import parse_options
from drtl_plugin.report.figures import draw_graph
from drtl_plugin.report.html import Curves, Page, Table, illustrate, illustrations_of_folder, write_html
from drtl_plugin.report.tables import (
    Gain,
    command_line,
    duration_in_words,
    network_in_words,
    relation_table,
    write_graph,
)
from drtl_plugin.runtime.trained_network import TrainedNetwork, load_trained
from drtl_plugin.sources.alignment import find_pairs

_PIXEL_LOSS = {'train': {'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0}}, 'path': {}}


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
    losses: Mapping[str, dict] | None = None,
) -> str:
    """Check the pairs, adapt the network to them, evaluate it by leaving each pair out, and write a report.

    ``output`` receives ``pairs/gt`` and ``pairs/lq``, ``adapt.yml`` (``basicsr train -opt`` repeats the adaptation),
    ``net_g_adapted_latest.pth``, ``knowledge_graph.png`` and ``.json``, and ``report.md`` and ``.html``.

    Args:
        pairs_folder (str): See :func:`~drtl_plugin.sources.alignment.find_pairs`.
        weights (str), option_file (str | None): See :func:`~drtl_plugin.runtime.trained_network.load_trained`.
        output (str): Folder to write; must be empty or not exist yet.
        auxiliary (str | None): Folder of GT images for the auxiliary tasks; None: the GT images of the pairs.
        steps (int): Adaptation steps.
        registers (bool): Align each GT image to its LQ image first.
        evaluates (bool): For each pair, also adapt to the others and evaluate on it.
        modules (Sequence[str]): Modules imported by ``--import``; the commands in the report need them, too.
        losses (Mapping[str, dict] | None): Sections ``train``, ``path`` and possibly ``network_d`` of an option file
            that declare the losses; None: the pixel loss, with a warning if the weights may be those of a GAN.

    Returns:
        str: The report, in Markdown.

    Raises:
        DataError: If there are no pairs, or they don't fit.
        OptionError: If weights or arguments are wrong.
    """
    if steps < 1:
        raise OptionError('--steps must be at least 1.')
    began = time.monotonic()
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f'-o: {output} already exists; choose another folder.')
    if auxiliary is not None:
        image_names(auxiliary, '--auxiliary')
    close_basicsr_logs()
    network = load_trained(weights, option_file)
    if losses is None and network.may_be_of_gan:
        print(
            f'basicsr: warning: {weights} may have been trained with a GAN, whose texture the default pixel loss '
            'smooths; --loss pixel=1 msssim=0.2 smooths less, --loss pixel=1 is the default without this warning.',
            file=sys.stderr,
        )
    found = find_pairs(pairs_folder, network.scale)
    alignments, images = {}, {}
    for name, alignments[name], pair in aligned(found, network.scale, registers):
        images[name] = pair
    lines = [f'# {len(found)} pairs of {pairs_folder}', '', *alignment_table(alignments)]
    if any(has_16_bits(path) for paths in found.values() for path in paths):
        lines += ['', '16-bit images were reduced to 8 bits, since BasicSR trains on 8 bits.']
    # BasicSR logs what it builds, here once for each pair.
    with quiet_basicsr_log(logging.INFO):
        try:
            write_pairs(images, target / 'pairs')
            opt, train_set = _write_options(
                adapt_model.adaptation_options(
                    network, weights, images, target, auxiliary, steps, losses or _PIXEL_LOSS
                ),
                target,
            )
            model = _adapt_to_all(opt, train_set, images, target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        lines += ['', '## Which synthetic distortions the camera resembles', '', '```']
        assert model.graph is not None
        lines += [relation_table(model.graph, model.weights), '```', '', '## How much adaptation gains', '']
        evaluations, unmeasured = [], ''
        if evaluates and len(images) > 1:
            try:
                evaluations = list(leave_one_out(opt, images, network))
            except BaseException:  # the adapted network is complete
                lines.append('Not measured: the evaluation failed.')
                (target / 'report.md').write_text('\n'.join([*lines, '']), encoding='utf-8')
                raise
            lines += evaluation_table(evaluations)
        else:
            unmeasured = 'there is only one pair' if len(images) == 1 else '--no-evaluation'
            lines.append(f'Not measured: {unmeasured}.')
    lines += ['', '## What to do next', '']
    adapted = target / 'net_g_adapted_latest.pth'
    restoring = command_line('upscale', '-i', 'IN', '-o', 'OUT', '--weights', adapted, modules=modules)
    repeating = command_line('train', '-opt', target / 'adapt.yml', modules=modules)
    lines += [f'- Restore images: `{restoring}`', f'- Repeat the adaptation, or change its options: `{repeating}`']
    report = '\n'.join(lines) + '\n'
    (target / 'report.md').write_text(report, encoding='utf-8')
    duration = duration_in_words(time.monotonic() - began)
    _write_page(target, report, evaluations, unmeasured, network, model, duration)
    return report


def _write_options(options: dict, target: Path) -> tuple[dict, Any]:
    """Write ``adapt.yml``; returns the parsed options, and the training set that checking them has built."""
    path = target / 'adapt.yml'
    path.write_text(yaml.safe_dump(options, sort_keys=False), encoding='utf-8')
    args = argparse.Namespace(opt=str(path), launcher='none', auto_resume=False, debug=False, force_yml=None)
    opt = parse_options(args, os.getcwd(), is_train=True)
    train_set = preflight.check(opt)['train']
    opt['path'].update(experiments_root=str(target), models=str(target))
    return opt, train_set


def _adapt_to_all(opt: dict, train_set: EpisodeDataset, images: Mapping[str, Pair], target: Path) -> DRTLModel:
    """Adapt to all pairs; writes weights and knowledge graph."""
    model = adapt_model.adapted_model(opt, list(images), train_set=train_set)
    model.save_network(model.net_g_adapted, 'net_g_adapted', -1)
    assert model.graph is not None and model.net_g_adapted is not None
    write_graph(model.graph, target / 'knowledge_graph.json', model.weights)
    draw_graph(model.graph, target / 'knowledge_graph.png', model.weights, model.fit_share)
    return model


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
        gains = [Gain(f'{mean_gain(evaluations):+.2f} dB PSNR-Y', against)]
        columns = ['pair', 'PSNR-Y before (dB)', 'PSNR-Y after (dB)', 'SSIM-Y before', 'SSIM-Y after']
        title = 'Each pair, restored by a network adapted to the others'
        tables = [Table(title, columns, evaluation_rows(evaluations))]
        caption = 'Each line is a pair, restored by a network adapted to the other pairs only.'
        courses = {evaluation.name: evaluation.course for evaluation in evaluations}
        curves = Curves('PSNR during adaptation', 'steps', 'PSNR-Y of the crop in dB', courses, caption)
        illustrations = [illustrate(curves)]
    page = Page(
        target.absolute().name,
        gains,
        unmeasured,
        {
            'Network': network_in_words(network.options, network.net),
            'Adaptation': f'{model.drtl.adapt.steps} steps on {len(model.target_pairs or ())} pairs',
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
