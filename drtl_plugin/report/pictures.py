"""Pictures of a run's knowledge graph and camera fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from drtl_plugin.relation.graph import KnowledgeGraph
from drtl_plugin.tasks.camera_fit import CameraFit
from drtl_plugin.tasks.camera_fit.kernel import kernel_sigma


def draw_graph(graph: KnowledgeGraph, path: str | Path, weights: Tensor, fixed_share: float | None = None) -> None:
    """Draw a knowledge graph: the target in the centre, the tasks around it, closer the more related they are.

    Node area grows with weight, node colour shows the relation, and an orange line joins each task to its most related
    task.

    Args:
        graph (KnowledgeGraph): N tasks and the target.
        path (str | Path): File to write; its suffix chooses the format.
        weights (Tensor): Gradient weights, ``(N,)``.
        fixed_share (float | None): Share of the total weight, in [0, 1], reserved for the last task, which is drawn as
            a square labelled with the share.
    """
    from matplotlib.figure import Figure  # unlike pyplot, without display and global state
    from matplotlib.lines import Line2D

    num = len(graph.labels)
    relation = graph.relation.tolist()
    angles = [2 * math.pi * i / num for i in range(num)]
    radii = [1.6 - r for r in relation]
    points = [(radius * math.cos(a), radius * math.sin(a)) for radius, a in zip(radii, angles, strict=True)]
    captions = [f'{label}\n×{weight:.2f}' for label, weight in zip(graph.labels, weights.tolist(), strict=True)]
    styles: list[dict[str, Any]] = [{'marker': 'o'}] * num
    keys = [
        Line2D([], [], color='tab:red', marker='*', markersize=12, linestyle='', label='target camera'),
        Line2D(
            [], [], color='0.6', marker='o', linestyle='', label='task: closer = more related, larger = more weight'
        ),
        Line2D([], [], color='tab:orange', alpha=0.5, label='joins a task to its most related task'),
    ]
    if fixed_share is not None:
        captions[-1] += f', fixed share {fixed_share:.0%}'
        styles[-1] = {'marker': 's', 'edgecolors': 'black'}
        label = 'task with a fixed share of the weight'
        keys.append(Line2D([], [], color='0.6', marker='s', markeredgecolor='black', linestyle='', label=label))
    figure = Figure(figsize=(8.5, 8), layout='constrained')
    axes = figure.add_subplot()
    axes.set_aspect('equal')
    axes.axis('off')
    for i in range(num):
        axes.plot(*zip((0, 0), points[i], strict=True), color='0.8', linewidth=0.3 + 2 * max(relation[i], 0), zorder=1)
        nearest = max((j for j in range(num) if j != i), key=lambda j: graph.edges[i, j], default=i)
        axes.plot(*zip(points[i], points[nearest], strict=True), color='tab:orange', alpha=0.5, linewidth=1, zorder=1)
    text: dict[str, Any] = {
        'textcoords': 'offset points',
        'ha': 'center',
        'parse_math': False,
        'bbox': {'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.6, 'pad': 0},
        'zorder': 4,
    }
    for point, r, weight, caption, style in zip(points, relation, weights.tolist(), captions, styles, strict=True):
        area = 40 + 220 * weight
        nodes = axes.scatter(*point, s=area, c=[r], cmap='viridis', vmin=-1, vmax=1, zorder=2, clip_on=False, **style)
        above = (0, 4 + math.sqrt(area / math.pi))  # area is in points², as matplotlib's markers are
        axes.annotate(caption, point, above, fontsize=8, **text)
    axes.scatter([0], [0], s=260, color='tab:red', marker='*', zorder=3)
    axes.annotate('target', (0, 0), (0, 10), **text)
    axes.legend(handles=keys, loc='upper center', bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, fontsize=9)
    figure.colorbar(nodes, ax=axes, label='relation to the target', shrink=0.6)
    figure.savefig(path, dpi=120, bbox_inches='tight')


def draw_camera_fit(fit: CameraFit, path: str | Path) -> None:
    """Draw the kernel of each colour with its sigma, and the summary of the fit.

    Args:
        fit (CameraFit): The fit.
        path (str | Path): File to write; its suffix chooses the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout='constrained')
    limit = fit.kernel.abs().max().item()
    for axes, name, kernel in zip(figure.subplots(1, 3), ('red', 'green', 'blue'), fit.kernel, strict=True):
        axes.imshow(kernel, cmap='RdBu', vmin=-limit, vmax=limit)
        axes.set_title(f'{name}: sigma {kernel_sigma(kernel):.2f} px')
        axes.axis('off')
    figure.suptitle(fit.summary().replace('; ', '\n'), fontsize=10)
    figure.savefig(path, dpi=110)
