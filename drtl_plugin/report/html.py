"""``report.html``: a self-contained page with gains, images, curves, the graph and the options."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import jinja2
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from drtl_plugin.report.tables import PASSES, Gain

# Weights below this share of the largest one are off the scale of the bar chart.
_SMALLEST_SHARE = 1e-4
# Names of tasks, files and datasets are not formulas.
_plain_text = rc_context({'text.parse_math': False})

_GRAPH_CAPTION = (
    'Each node is a task, and the star is the target camera. The closer a task is to the star, the more related it is '
    'to the camera. The colour is the same relation, from -1 to 1; the area of a node grows with the weight of its '
    'task, given as × the mean weight. Orange lines join each task to the task that it is most related to.'
)
_FIXED_SHARE_CAPTION = (
    ' The square is the camera-fit task: {share:.0%} of the total weight is reserved for it '
    '(drtl.weighting.fit_share), whatever its relation, so it can be large and still far from the star.'
)
_WEIGHTS_CAPTION = (
    'The last weights of the tasks, on a logarithmic axis. The dashed line at 1 is the mean weight: a task at 2 counts '
    'twice as much as the mean.'
)
_CAMERA_FIT_CAPTION = (
    "The camera's blur kernel for each colour, fitted to its pairs, in pixels of the ground truth: blue adds light, "
    'red removes it. The headings give the width of the Gaussian with the same energy. The first lines say how much of '
    'the error of bicubic downsampling the fit explains, on the fitted pairs and on pairs left out of the fit.'
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A crop of an image before and after adaptation.

    Attributes:
        name (str): The image's file name without extension.
        before, after, gt (np.ndarray): ``(H, W, 3)``, uint8, BGR.
    """

    name: str
    before: np.ndarray
    after: np.ndarray
    gt: np.ndarray


@dataclass(frozen=True)
class Curves:
    """Lines over steps or iterations.

    Attributes:
        title, x, y (str): Title of the plot and labels of its axes.
        lines (Mapping[str, Sequence[tuple[float, float]]]): Points by the name of the line; none is empty.
        caption (str): Explanation below the plot.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    caption: str


@dataclass(frozen=True)
class Illustration:
    """A picture with its caption.

    Attributes:
        title (str): Heading.
        png (bytes): PNG file.
        alt (str): Description for those who cannot see the picture.
        caption (str): Explanation below the picture.
        is_wide (bool): Whether its labels could not be read on a phone's width; then it scrolls there.
    """

    title: str
    png: bytes
    alt: str
    caption: str
    is_wide: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        title (str): Heading.
        columns (Sequence[str]): Heads of the columns.
        rows (Sequence[Sequence[str]]): Cells.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Page:
    """Contents of a report, in the order in which they appear.

    Attributes:
        title (str): Heading.
        gains (Sequence[Gain]): Headline.
        unmeasured (str): Why the gain was not measured; shown where there are no gains.
        facts (Mapping[str, str]): The network, the duration and the like, by name.
        tables (Sequence[Table]): Results.
        comparisons (Sequence[Comparison]): Each is shown with a slider.
        illustrations (Sequence[Illustration]): Curves, weights, graph, camera fit.
        details (Mapping[str, str]): Texts by name, folded.
    """

    title: str
    gains: Sequence[Gain]
    unmeasured: str
    facts: Mapping[str, str]
    tables: Sequence[Table]
    comparisons: Sequence[Comparison]
    illustrations: Sequence[Illustration]
    details: Mapping[str, str]


def write_html(path: Path, page: Page) -> None:
    """Write a report.

    Args:
        path (Path): File to write.
        page (Page): Its contents.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters['data_uri'] = lambda png: f'data:image/png;base64,{base64.b64encode(png).decode()}'
    environment.filters['png'] = lambda image: cv2.imencode('.png', image)[1].tobytes()
    path.write_text(environment.get_template('page.html').render(page=page), encoding='utf-8')


def curves_of_folder(folder: Path, psnr_names: Mapping[str, str]) -> list[Curves]:
    """Metrics over the iterations, from ``metrics.csv`` of an experiment.

    Args:
        folder (Path): Folder of the experiment.
        psnr_names (Mapping[str, str]): See :func:`drtl_plugin.report.tables.psnr_names`.
    """
    path = folder / 'metrics.csv'
    if not path.is_file():
        return []
    metrics: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with open(path, newline='', encoding='utf-8') as file:
        for row in csv.DictReader(file):
            lines = metrics.setdefault(row['metric'], {})
            lines.setdefault(row['dataset'], []).append((float(row['iteration']), float(row['value'])))
    caption = '. '.join(f'NAME{suffix}: {words}' for suffix, words in PASSES.items()) + '. NAME is the validation set.'
    curves = []
    for metric, lines in metrics.items():
        last = max(iteration for line in lines.values() for iteration, _ in line)
        # A value that does not change is drawn as a horizontal line.
        lines = {name: line if len(line) > 1 else [*line, (last, line[0][1])] for name, line in lines.items()}
        y = f'{psnr_names[metric]} (dB)' if metric in psnr_names else metric
        curves.append(Curves(f'{metric} while training', 'iteration', y, lines, caption))
    return curves


def illustrations_of_folder(
    folder: Path, psnr_names: Mapping[str, str], fixed_share: float | None
) -> list[Illustration]:
    """Illustrations of the metrics, weights, knowledge graph and camera fit found in the folder of an experiment.

    Args:
        folder (Path): Holds ``metrics.csv``, ``knowledge_graph.json`` and ``.png``, ``camera_fit.png``.
        psnr_names (Mapping[str, str]): See :func:`drtl_plugin.report.tables.psnr_names`.
        fixed_share (float | None): Share of the total weight that the last task receives whatever its relation.
    """
    illustrations = [illustrate(curves) for curves in curves_of_folder(folder, psnr_names)]
    graph = folder / 'knowledge_graph.json'
    if graph.is_file():
        content = json.loads(graph.read_text(encoding='utf-8'))
        labels, weights, relation = (content[key] for key in ('labels', 'weights', 'relation'))
        illustrations.append(_weights(labels, weights, fixed_share))
        caption = _GRAPH_CAPTION
        if fixed_share is not None:
            caption += _FIXED_SHARE_CAPTION.format(share=fixed_share)
        related = sorted(zip(relation, labels, strict=True), reverse=True)
        alt = 'Relation of each task to the target camera: ' + '; '.join(f'{label} {r:+.2f}' for r, label in related)
        picture = graph.with_suffix('.png').read_bytes()
        illustrations.append(Illustration('Knowledge graph', picture, alt, caption, is_wide=True))
    fit = folder / 'camera_fit.png'
    if fit.is_file():
        alt = 'Blur kernels of the camera for red, green and blue'
        illustrations.append(Illustration('Camera fit', fit.read_bytes(), alt, _CAMERA_FIT_CAPTION, is_wide=True))
    return illustrations


@_plain_text
def illustrate(curves: Curves) -> Illustration:
    """Draw curves."""
    figure = Figure(figsize=(5.5, 4), layout='constrained')
    axes = figure.add_subplot()
    handles = [
        axes.plot(*zip(*line, strict=True), marker='o', markersize=4, linestyle=('-', '--', ':')[i // 10 % 3])[0]
        for i, line in enumerate(curves.lines.values())
    ]
    axes.set(xlabel=curves.x, ylabel=curves.y)
    axes.grid(alpha=0.3)
    figure.legend(handles, list(curves.lines), loc='outside lower center', ncols=2, frameon=False)
    last = '; '.join(f'{name}: {line[-1][1]:.4g}' for name, line in curves.lines.items())
    alt = f'{curves.y} over {curves.x}. Last values: {last}'
    return Illustration(curves.title, _png(figure), alt, curves.caption)


@_plain_text
def _weights(labels: Sequence[str], weights: Sequence[float], fixed_share: float | None) -> Illustration:
    """Draw the weights of the tasks as bars, the largest first."""
    names, fixed = list(labels), None
    if fixed_share is not None:
        fixed = len(names) - 1
        names[fixed] += f' (fixed share {fixed_share:.0%})'
    order = sorted(range(len(names)), key=lambda i: weights[i])
    most = weights[order[-1]]
    least = min(weight for weight in weights if weight >= _SMALLEST_SHARE * most) / 2
    figure = Figure(figsize=(5.5, 1 + 0.25 * len(names)), layout='constrained')
    axes = figure.add_subplot()
    colours = ['tab:orange' if i == fixed else 'tab:blue' for i in order]
    bars = axes.barh(range(len(order)), [max(weights[i], least) for i in order], color=colours)
    axes.bar_label(bars, [f'×{weights[i]:.3g}' for i in order], padding=3)
    axes.set_yticks(range(len(order)), [names[i] for i in order])
    # The right fifth is left for the numbers beside the bars.
    axes.set(xscale='log', xlim=(least, most * (most / least) ** 0.3), xlabel='weight')
    axes.xaxis.set_major_formatter('{x:g}')
    axes.axvline(1, color='0.4', linestyle='--', linewidth=1)
    alt = 'Weights of the tasks: ' + '; '.join(f'{names[i]} ×{weights[i]:.3g}' for i in reversed(order))
    return Illustration('Weights of the tasks', _png(figure), alt, _WEIGHTS_CAPTION)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=200)
    return content.getvalue()
