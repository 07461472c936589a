"""Text results of a run: tables of metrics, gains and relations, and files for them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from drtl_plugin import shell
from drtl_plugin.relation.graph import KnowledgeGraph
from drtl_plugin.relation.weights import effective_number

# Validation passes of a training run: the suffix that names the results after the dataset, and the name in words.
BICUBIC, BEFORE, AFTER = '_bicubic', '', '_adapted'
PASSES = {BICUBIC: 'bicubic upsampling', BEFORE: 'before adaptation', AFTER: 'after adaptation'}
# Passes of a test.
TEST_PASSES = {BICUBIC: PASSES[BICUBIC], BEFORE: 'network'}


class Gain(NamedTuple):
    """A difference to report first.

    Attributes:
        value (str): Signed number with its unit.
        against (str): The two sides that are compared, and on which images.
    """

    value: str
    against: str


def results_table(results: Mapping[str, Mapping[str, float]], passes: Mapping[str, str] = PASSES) -> str:
    """The metrics of each validation set with bicubic upsampling and with networks.

    Args:
        results (Mapping): Metrics by dataset name and pass.
        passes (Mapping): The passes to list, and their names in words.

    Returns:
        str: A table for each dataset; a row for each pass, a column for each metric, 4 decimals.
    """
    tables = []
    for dataset, rows in results_by_pass(results).items():
        metrics = list(rows[BICUBIC])
        lines = [f'{dataset:<24}' + ''.join(f'{metric:>12}' for metric in metrics)]
        lines += [f'  {passes[s]:<22}' + ''.join(f'{row[m]:>12.4f}' for m in metrics) for s, row in rows.items()]
        tables.append('\n'.join(lines))
    return '\n'.join(tables)


def write_image_metrics(path: Path, images: Mapping[str, Sequence[tuple[str, Mapping[str, float]]]]) -> None:
    """Write the metrics of each image to a CSV file, sorted by name: ``image``, ``method``, and the metrics.

    Args:
        path (Path): File to write.
        images (Mapping): Names and metrics of the images, by method.
    """
    rows = [
        [name, method, *map(float, metrics.values())]
        for method, of_images in images.items()
        for name, metrics in of_images
    ]
    metric_names = next(iter(images.values()))[0][1]
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([['image', 'method', *metric_names], *sorted(rows)])


def results_by_pass(results: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Mapping[str, float]]]:
    """The metrics of each pass by dataset name, then by suffix of the pass; datasets without metrics are left out.

    Args:
        results (Mapping): Metrics by dataset name and pass.
    """
    datasets = [name[: -len(BICUBIC)] for name, metrics in results.items() if name.endswith(BICUBIC) and metrics]
    return {
        dataset: {suffix: results[dataset + suffix] for suffix in PASSES if dataset + suffix in results}
        for dataset in datasets
    }


def gains_of_results(results: Mapping[str, Mapping[str, float]], psnr_names: Mapping[str, str]) -> list[Gain]:
    """The gain on each validation set: over the network before adaptation, and over bicubic upsampling.

    Args:
        results (Mapping): Metrics by dataset name and pass.
        psnr_names (Mapping): See :func:`psnr_names`; the first of them is reported, or else the first metric.

    Returns:
        list[Gain]: Without adaptation, only the gain of the trained network over bicubic upsampling.
    """
    gains = []
    for dataset, rows in results_by_pass(results).items():
        metric = next((name for name in rows[BICUBIC] if name in psnr_names), next(iter(rows[BICUBIC])))
        best = AFTER if AFTER in rows else BEFORE
        for suffix in (BEFORE, BICUBIC):
            if suffix != best:
                difference = rows[best][metric] - rows[suffix][metric]
                value = f'{difference:+.4f} {metric}'
                if metric in psnr_names:
                    value = f'{difference:+.2f} dB {psnr_names[metric]}'
                gains.append(Gain(value, f'{PASSES[best]}, compared with {PASSES[suffix]} ({dataset})'))
    return gains


def psnr_names(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The metrics whose unit is dB: ``PSNR-Y``, where computed on luma, or ``PSNR``, by name in the option file.

    Args:
        metrics (Mapping): ``val.metrics`` of the option file.
    """
    return {
        name: 'PSNR-Y' if section.get('test_y_channel') else 'PSNR'
        for name, section in metrics.items()
        if section['type'] == 'calculate_psnr'
    }


def network_in_words(options: Mapping[str, Any], net: nn.Module) -> str:
    """Type and number of parameters of a network.

    Args:
        options (Mapping): ``network_g`` of the option file.
        net (nn.Module): The network.
    """
    return f'{options["type"]}, {sum(parameter.numel() for parameter in net.parameters()):,} parameters'


def duration_in_words(seconds: float) -> str:
    """Hours, minutes and seconds, with the units that are needed."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, 'h'), (minutes, 'min'), (seconds, 's'))
    return ' '.join(f'{number} {unit}' for number, unit in parts if number) or '0 s'


def command_line(*words: object, modules: Sequence[str] = ()) -> str:
    """A ``basicsr`` command to paste into a shell.

    Args:
        words (object): The subcommand and its arguments; those with spaces are quoted.
        modules (Sequence[str]): Modules that the command must ``--import``.

    Returns:
        str: The command.
    """
    imports = ['--import', *modules] if modules else []
    return shell.join('basicsr', *words, *imports)


def relation_table(graph: KnowledgeGraph, weights: Tensor) -> str:
    """The tasks by weight: name, relation to the target, gradient weight, and a bar.

    Args:
        graph (KnowledgeGraph): N tasks and the target.
        weights (Tensor): Gradient weights, ``(N,)``.
    """
    rows = sorted(zip(weights.tolist(), graph.relation.tolist(), graph.labels, strict=True), reverse=True)
    width = max(len(label) for label in graph.labels)
    most = rows[0][0]
    lines = [
        f'  {label:<{width}}  {relation:+.2f}  x{weight:.2f}  {"#" * round(30 * weight / most)}'
        for weight, relation, label in rows
    ]
    lines.append(f'  {effective_number(weights):.1f} effective of {len(rows)} tasks')
    return '\n'.join(lines)


def write_graph(graph: KnowledgeGraph, path: str | Path, weights: Tensor) -> None:
    """Write labels, relation, weights and edges as JSON.

    Args:
        graph (KnowledgeGraph): N tasks and the target.
        path (str | Path): File to write.
        weights (Tensor): Gradient weights, ``(N,)``.
    """
    content = {
        'labels': list(graph.labels),
        'relation': graph.relation.tolist(),
        'weights': weights.tolist(),
        'edges': graph.edges.tolist(),
    }
    Path(path).write_text(json.dumps(content, indent=1), encoding='utf-8')
