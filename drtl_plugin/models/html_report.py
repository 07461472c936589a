"""A report to look at, in one file that needs nothing else: before and after, curves, the graph, the options."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from drtl_plugin.models.report import busiest

# Side of the crops, in pixels of the ground truth, and how large they are shown.
_CROP, _SHOWN = 256, 512


@dataclass(frozen=True, eq=False)
class Comparison:
    """An image before and after adaptation.

    Attributes:
        name (str): What it is.
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
        title, x, y (str): Of the plot and its axes.
        lines (Mapping[str, Sequence[tuple[float, float]]]): Points by the name of the line.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def write_html(
    path: Path, title: str, text: str, comparisons: Sequence[Comparison], curves: Sequence[Curves], options: str
) -> None:
    """Write a report.

    Args:
        path (Path): File to write; ``knowledge_graph.png``, where it lies beside, is taken into it.
        title (str): Heading.
        text (str): What came out, for the first lines; shown as it is.
        comparisons (Sequence[Comparison]): Shown where the ground truth has most detail, with a slider.
        curves (Sequence[Curves]): Those without a line are left out.
        options (str): The option file.
    """
    parts = [f'<h1>{html.escape(title)}</h1>', f'<pre>{html.escape(text)}</pre>']
    if comparisons:
        parts.append('<h2>Before and after adaptation</h2><p>Drag the sliders. On the right: the ground truth.</p>')
        parts += [_slider(comparison) for comparison in comparisons]
    for plot in curves:
        if any(plot.lines.values()):
            parts.append(f'<h2>{html.escape(plot.title)}</h2>{_picture(_plot(plot), plot.title)}')
    graph = path.with_name('knowledge_graph.png')
    if graph.is_file():
        parts.append(f'<h2>Knowledge graph</h2>{_picture(graph.read_bytes(), "knowledge graph")}')
    parts.append(f'<h2>Options</h2><pre>{html.escape(options)}</pre>')
    page = _PAGE.replace('TITLE', html.escape(title)).replace('SHOWN', str(_SHOWN)).replace('BODY', '\n'.join(parts))
    path.write_text(page, encoding='utf-8')


def curves_of_folder(folder: Path) -> list[Curves]:
    """Metrics and weights over the iterations, from ``metrics.csv`` and ``weights.csv`` of an experiment."""
    curves = []
    metrics = _columns(folder / 'metrics.csv', 'metric', 'dataset', 'value')
    for metric, lines in metrics.items():
        last = max(iteration for line in lines.values() for iteration, _ in line)
        # What does not change is drawn as a level.
        lines = {name: line if len(line) > 1 else [*line, (last, line[0][1])] for name, line in lines.items()}
        curves.append(Curves(f'{metric} while training', 'iteration', metric, lines))
    weights = _columns(folder / 'weights.csv', None, 'task', 'weight')
    if weights:
        curves.append(Curves('Weights of the tasks', 'iteration', 'weight', weights['']))
    return curves


def _columns(path: Path, plot: str | None, line: str, value: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points by plot and line from a CSV file; nothing where there is none."""
    plots: dict[str, dict[str, list[tuple[float, float]]]] = {}
    if path.is_file():
        with open(path, newline='', encoding='utf-8') as file:
            for row in csv.DictReader(file):
                lines = plots.setdefault(row[plot] if plot else '', {})
                lines.setdefault(row[line], []).append((float(row['iteration']), float(row[value])))
    return plots


def _slider(comparison: Comparison) -> str:
    top, left = busiest(comparison.gt, _CROP)
    crops = [
        _data_uri(cv2.imencode('.png', image[top : top + _CROP, left : left + _CROP])[1].tobytes())
        for image in (comparison.after, comparison.before, comparison.gt)
    ]
    name = html.escape(comparison.name)
    return (
        f'<h3>{name}</h3><div class="pair"><div class="compare"><img alt="{name}, after" src="{crops[0]}">'
        f'<img class="before" alt="{name}, before" src="{crops[1]}"><span>before</span><span>after</span>'
        f'<input type="range" min="0" max="100" value="50" aria-label="{name}: share of the image before">'
        f'</div><img alt="{name}, ground truth" src="{crops[2]}"></div>'
    )


def _plot(plot: Curves) -> bytes:
    figure = Figure(figsize=(9, 4.5), layout='constrained')
    axes = figure.add_subplot()
    for i, (name, line) in enumerate(plot.lines.items()):
        axes.plot(*zip(*line), marker='o', markersize=3, label=name, linestyle=('-', '--', ':')[i // 10 % 3])
    axes.set(xlabel=plot.x, ylabel=plot.y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=100)
    return content.getvalue()


def _picture(content: bytes, alt: str) -> str:
    return f'<img class="wide" alt="{html.escape(alt)}" src="{_data_uri(content)}">'


def _data_uri(png: bytes) -> str:
    return f'data:image/png;base64,{base64.b64encode(png).decode()}'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<link rel="icon" href="data:,">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 13px; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.pair img { width: SHOWNpx; max-width: 100%; display: block; image-rendering: pixelated; }
.compare { position: relative; width: SHOWNpx; max-width: 100%; }
.compare .before { position: absolute; top: 0; left: 0; clip-path: inset(0 50% 0 0); border: 0; }
.compare input { width: 100%; margin: 0.3rem 0 0; }
.compare span { position: absolute; top: 0; left: 0; padding: 0 0.4rem; background: #fffb; font-size: 13px; }
.compare span + span { left: auto; right: 0; }
.wide { max-width: 100%; }
</style>
</head>
<body>
BODY
<script>
for (const slider of document.querySelectorAll('.compare input')) {
  const before = slider.parentElement.querySelector('.before');
  const show = () => { before.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`; };
  slider.addEventListener('input', show);
  show();
}
</script>
</body>
</html>
"""
