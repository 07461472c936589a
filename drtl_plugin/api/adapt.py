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
from basicsr.models import build_model

from drtl_plugin import preflight
from drtl_plugin.api import adapt_model
from drtl_plugin.api.adapt_evaluation import Evaluation, evaluate_folds, evaluation_rows, evaluation_table, mean_gain
from drtl_plugin.api.adapt_pairs import aligned, alignment_table, write_pairs
from drtl_plugin.compat.basicsr import close_basicsr_logs, quiet_basicsr_log
from drtl_plugin.data.image_files import image_names
from drtl_plugin.data.interface import EpisodeDataset
from drtl_plugin.data.photographs import has_16_bits
from drtl_plugin.errors import DataError
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

_PIXEL_LOSS = {'train': {'pixel_opt': {'type': 'MSELoss', 'loss_weight': 1.0}}, 'path': {}}


def adapt(
    pairs_folder: str,
    weights: str,
    output: str,
    option_file: str | None = None,
    auxiliary: str | None = None,
    budget: int | None = None,
    registers: bool = False,
    modules: Sequence[str] = (),
    losses: Mapping[str, dict] | None = None,
) -> str:
    """Check the pairs, adapt the network to them with settings chosen on held-out pairs, and write a report.

    ``output`` receives ``pairs/gt`` and ``pairs/lq``, ``adapt.yml`` (``basicsr train -opt`` repeats the adaptation),
    ``net_g_adapted_latest.pth``, ``knowledge_graph.png`` and ``.json``, and ``report.md`` and ``.html``.

    Args:
        pairs_folder (str): See :func:`~drtl_plugin.sources.alignment.find_pairs`.
        weights (str), option_file (str | None): See :func:`~drtl_plugin.runtime.trained_network.load_trained`.
        output (str): Folder to write; must be empty or not exist yet.
        auxiliary (str | None): Folder of GT images for the auxiliary tasks; None: the GT images of the pairs.
        budget (int | None): The most training steps; None: as many as
            :func:`~drtl_plugin.api.adapt_model.adaptation_options` finds good.
        registers (bool): Align each GT image to its LQ image first.
        modules (Sequence[str]): Modules imported by ``--import``; the commands in the report need them, too.
        losses (Mapping[str, dict] | None): Sections ``train``, ``path`` and possibly ``network_d`` of an option file
            that declare the losses; None: the pixel loss, with a warning if the weights may be those of a GAN.

    Returns:
        str: The report, in Markdown.

    Raises:
        DataError: If there are no pairs, or they don't fit.
        OptionError: If weights or arguments are wrong.
    """
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
                    network, weights, images, target, auxiliary, budget, losses or _PIXEL_LOSS
                ),
                target,
            )
            model = _adapted_model(opt, train_set, target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        chosen = model.adapter.cross_validation
        assert model.graph is not None and chosen is not None
        evaluations = list(evaluate_folds(chosen, images, network))
    lines += ['', '## How much adaptation gains', '', chosen.in_words(), '']
    lines += evaluation_table(evaluations, chosen.share)
    lines += ['', '## Which synthetic distortions the camera resembles', '', '```']
    lines += [relation_table(model.graph, model.weights), '```']
    lines += ['', '## What to do next', '']
    adapted = target / 'net_g_adapted_latest.pth'
    restoring = command_line('upscale', '-i', 'IN', '-o', 'OUT', '--weights', adapted, modules=modules)
    repeating = command_line('train', '-opt', target / 'adapt.yml', modules=modules)
    lines += [f'- Restore images: `{restoring}`', f'- Repeat the adaptation, or change its options: `{repeating}`']
    report = '\n'.join(lines) + '\n'
    (target / 'report.md').write_text(report, encoding='utf-8')
    duration = duration_in_words(time.monotonic() - began)
    _write_page(target, report, evaluations, network, model, duration)
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


def _adapted_model(opt: dict, train_set: EpisodeDataset, target: Path) -> DRTLModel:
    """Adapt to the pairs; writes weights and knowledge graph."""
    model = build_model(opt)
    model.train_set = train_set
    model.start()
    model.adapt_to_target()
    model.save_network(model.net_g_adapted, 'net_g_adapted', -1)
    write_graph(model.graph, target / 'knowledge_graph.json', model.weights)
    draw_graph(model.graph, target / 'knowledge_graph.png', model.weights, model.fit_share)
    return model


def _write_page(
    target: Path,
    report: str,
    evaluations: Sequence[Evaluation],
    network: TrainedNetwork,
    model: DRTLModel,
    duration: str,
) -> None:
    """Write ``report.html``."""
    chosen = model.adapter.cross_validation
    assert chosen is not None
    against = f'after adaptation, compared with before (mean of {len(evaluations)} held-out images)'
    gains = [Gain(f'{mean_gain(evaluations):+.2f} dB PSNR-Y', against)]
    columns = ['pair', 'PSNR-Y before (dB)', 'PSNR-Y after (dB)', 'SSIM-Y before', 'SSIM-Y after']
    table = Table('Each pair, restored by a network adapted to the others', columns, evaluation_rows(evaluations))
    curves = Curves(
        'What held-out pairs chose',
        'share of the way from the old weights to the adapted ones',
        'loss on held-out pairs, relative to the old weights',
        {
            **{f'rate {trial.lr:g}, two folds': sorted(trial.losses.items()) for trial in chosen.trials},
            f'rate {chosen.lr:g}, all folds': sorted(chosen.losses.items()),
        },
        chosen.in_words(),
    )
    page = Page(
        target.absolute().name,
        gains,
        '',
        {
            'Network': network_in_words(network.options, network.net),
            'Adaptation': model.adapter.in_words(),
            'Duration': duration,
        },
        [table],
        [evaluation.comparison for evaluation in evaluations],
        [illustrate(curves), *illustrations_of_folder(target, {}, model.fit_share)],
        {
            'Report as text: report.md': report,
            'Options: adapt.yml': (target / 'adapt.yml').read_text(encoding='utf-8'),
        },
    )
    write_html(target / 'report.html', page)
