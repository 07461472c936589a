"""What a run leaves for people: the table of its last lines, and a picture to look at."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor, nn

from drtl_plugin import shell
from drtl_plugin.relation.graph import KnowledgeGraph
from drtl_plugin.relation.weights import effective_number

# What a training run validates: the suffix that names its results after the dataset, and its name in words.
BICUBIC, BEFORE, AFTER = '_bicubic', '', '_adapted'
PASSES = {BICUBIC: 'bicubic upsampling', BEFORE: 'before adaptation', AFTER: 'after adaptation'}
# What a test validates.
TEST_PASSES = {BICUBIC: PASSES[BICUBIC], BEFORE: 'network'}
_TILE = 192
_CAPTION = 22
# Side of the crops that are kept of validated images: a tile, and some of what surrounds it.
_CROP = 320


class Gain(NamedTuple):
    """A difference to report first.

    Attributes:
        value (str): Signed number with its unit.
        against (str): What is compared with what, and on which images.
    """

    value: str
    against: str


class ComparedCrop(NamedTuple):
    """A crop of a validated image, where its ground truth has most detail.

    Attributes:
        name (str): The image's file name without extension.
        result, gt (np.ndarray): Restored image and ground truth in the same place; uint8 BGR ``(H, W, 3)``, H and W at
            most 320.
    """

    name: str
    result: np.ndarray
    gt: np.ndarray


def compared_crop(name: str, result: np.ndarray, gt: np.ndarray) -> ComparedCrop:
    """Crop a restored image and its ground truth; the place depends on the ground truth only.

    The crops are copies, so that nothing keeps the whole images in memory.

    Args:
        name (str): The image's file name without extension.
        result, gt (np.ndarray): uint8 BGR ``(H, W, 3)``.
    """
    starts = (
        max(min(corner - (_CROP - _TILE) // 2, extent - _CROP), 0)
        for corner, extent in zip(busiest(gt, _TILE), gt.shape[:2], strict=True)
    )
    rows, columns = (slice(start, start + _CROP) for start in starts)
    return ComparedCrop(name, result[rows, columns].copy(), gt[rows, columns].copy())


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


def psnr_names(metrics: Mapping[str, Mapping]) -> dict[str, str]:
    """The metrics whose unit is dB: ``PSNR-Y``, where computed on luma, or ``PSNR``, by name in the option file.

    Args:
        metrics (Mapping): ``val.metrics`` of the option file.
    """
    return {
        name: 'PSNR-Y' if section.get('test_y_channel') else 'PSNR'
        for name, section in metrics.items()
        if section['type'] == 'calculate_psnr'
    }


def network_in_words(options: Mapping, net: nn.Module) -> str:
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


def comparison_picture(images: Mapping[str, Sequence[ComparedCrop]], dataset: str) -> np.ndarray | None:
    """Crops side by side, where the ground truth has most detail: a row for each image, each pass and the ground truth.

    Args:
        images (Mapping): Crops of some images, by dataset name and pass.
        dataset (str): The validation set.

    Returns:
        ndarray | None: uint8 BGR ``(H, W, 3)``; None where there are no images.
    """
    shown = {suffix: images[dataset + suffix] for suffix in PASSES if images.get(dataset + suffix)}
    rows = []
    for crops in zip(*shown.values(), strict=True):
        gt = crops[0].gt
        top, left = busiest(gt, _TILE)
        tiles = [crop.result for crop in crops] + [gt]
        rows.append(np.hstack([tile[top : top + _TILE, left : left + _TILE] for tile in tiles]))
    if not rows:
        return None
    width = max(row.shape[1] for row in rows)
    rows = [cv2.copyMakeBorder(row, 0, 0, 0, width - row.shape[1], cv2.BORDER_CONSTANT) for row in rows]
    captions = [PASSES[suffix] for suffix in shown] + ['ground truth']
    head = np.full((_CAPTION, width, 3), 255, np.uint8)
    for i, caption in enumerate(captions):
        place = (i * width // len(captions) + 4, _CAPTION - 7)
        cv2.putText(head, caption, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([head, *rows])


def busiest(gt: np.ndarray, side: int) -> tuple[int, int]:
    """Corner, top and left, of the square with the strongest gradients."""
    grey = cv2.cvtColor(gt, cv2.COLOR_BGR2GRAY)
    detail = cv2.boxFilter(np.abs(cv2.Laplacian(grey, cv2.CV_32F)), -1, (side, side), anchor=(0, 0))
    height, width = (max(extent - side + 1, 1) for extent in grey.shape)
    top, left = np.unravel_index(np.argmax(detail[:height, :width]), (height, width))
    return int(top), int(left)


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
