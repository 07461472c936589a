"""The end of a training run: comparison pictures, ``report.html`` and the final message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
from torch import nn

from drtl_plugin.report.html import Comparison, Page, Table, illustrations_of_folder, write_html
from drtl_plugin.report.pictures import ComparedCrop, comparison_picture
from drtl_plugin.report.tables import (
    AFTER,
    BEFORE,
    BICUBIC,
    PASSES,
    command_line,
    duration_in_words,
    gains_of_results,
    network_in_words,
    psnr_names,
    results_by_pass,
    results_table,
)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The results of a run, from which its report is written.

    Attributes:
        opt (dict): The parsed option file.
        net_g (nn.Module): The trained network.
        results (Mapping[str, Mapping[str, float]]): Metrics by dataset name and pass.
        compared (Mapping[str, Sequence[ComparedCrop]]): Crops of validated images, by the same names.
        num_update (int): Training steps.
        resumed_at (int): Steps of the run that this one resumed, or 0.
        adaptation (str | None): Steps and pairs in words; None if nothing was adapted.
        seconds (float): Duration of this process.
        fit_share (float | None): Share of the total weight reserved for the camera fit, if there is one.
    """

    opt: dict[str, Any]
    net_g: nn.Module
    results: Mapping[str, Mapping[str, float]]
    compared: Mapping[str, Sequence[ComparedCrop]]
    num_update: int
    resumed_at: int
    adaptation: str | None
    seconds: float
    fit_share: float | None


def write_outcome(outcome: Outcome, modules: Sequence[str] = ()) -> str:
    """Write ``comparison_DATASET.png`` and ``report.html`` into the experiment's folder.

    Args:
        outcome (Outcome): The results.
        modules (Sequence[str]): Modules that ``--import`` loaded; the next command needs them, too.

    Returns:
        str: A message with the locations of the results, the next command, and a table of the metrics.
    """
    root = Path(outcome.opt['path']['experiments_root'])
    for dataset in (name[: -len(BICUBIC)] for name in outcome.compared if name.endswith(BICUBIC)):
        picture = comparison_picture(outcome.compared, dataset)
        if picture is not None:
            (root / f'comparison_{dataset}.png').write_bytes(cv2.imencode('.png', picture)[1].tobytes())
    _write_page(outcome, root)
    weights = root / 'models' / f'net_g{"" if outcome.adaptation is None else AFTER}_latest.pth'
    command = command_line('upscale', '-i', 'IN', '-o', 'OUT', '--weights', weights, modules=modules)
    return (
        f'Weights, knowledge graph, pictures and report.html are in {root}.\n'
        f'Restore photographs: {command}\n{results_table(outcome.results)}'
    )


def _write_page(outcome: Outcome, root: Path) -> None:
    """Write ``report.html`` from the results and the records in the experiment's folder."""
    opt = outcome.opt
    names = psnr_names((opt.get('val') or {}).get('metrics') or {})
    facts = {'Network': network_in_words(opt['network_g'], outcome.net_g)}
    if outcome.num_update:
        facts['Training'] = f'{outcome.num_update} iterations'
    if outcome.adaptation is not None:
        facts['Adaptation'] = outcome.adaptation
    facts['Duration'] = duration_in_words(outcome.seconds)
    if outcome.resumed_at:
        facts['Duration'] += f' since the run was resumed at iteration {outcome.resumed_at}'
    page = Page(
        opt['name'],
        gains_of_results(outcome.results, names),
        'no validation set has ground truth and metrics',
        facts,
        _tables(outcome.results, names),
        _comparisons(outcome.compared),
        illustrations_of_folder(root, names, outcome.fit_share),
        {f'Options: {path.name}': path.read_text(encoding='utf-8') for path in sorted(root.glob('*.yml'))},
    )
    write_html(root / 'report.html', page)


def _tables(results: Mapping[str, Mapping[str, float]], names: Mapping[str, str]) -> list[Table]:
    tables = []
    for dataset, rows in results_by_pass(results).items():
        metrics = list(rows[BICUBIC])
        columns = ['', *(f'{names[metric]} (dB)' if metric in names else metric for metric in metrics)]
        cells = [[PASSES[suffix], *(f'{row[metric]:.4f}' for metric in metrics)] for suffix, row in rows.items()]
        tables.append(Table(f'Results on {dataset}', columns, cells))
    return tables


def _comparisons(compared: Mapping[str, Sequence[ComparedCrop]]) -> list[Comparison]:
    comparisons = []
    for name in (name for name in compared if name.endswith(AFTER)):
        dataset = name[: -len(AFTER)]
        for before, after in zip(compared[dataset + BEFORE], compared[name], strict=True):
            comparisons.append(Comparison(f'{before.name} ({dataset})', before.result, after.result, before.gt))
    return comparisons
