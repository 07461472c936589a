"""The knowledge graph, and the weights that follow from it.

The paper (arXiv 2111.13078) names a knowledge graph, cosine similarity and gradient weighting by relation. Formulas:

- edges ``r_ij = cos(v_i, v_j)`` between embeddings centred over the library (paper: cosine; ours: centring):
  :func:`graph_from_embeddings`
- weights ``w = softmax(r / τ)`` scaled to mean 1 (reconstruction): :func:`relation_weights`
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from drtl_plugin.errors import DataError


class NonFiniteRelationError(DataError):
    """A relation is NaN or infinite, so no weights follow from it."""


def require_finite(labels: Iterable[str], finite: Tensor) -> None:
    """Refuse a relation that is not finite.

    Args:
        labels (Iterable[str]): Names of the N auxiliary tasks.
        finite (Tensor): Boolean; whether each task's measurement is finite, ``(N,)``, or with the target's last,
            ``(N + 1,)``.

    Raises:
        NonFiniteRelationError: If one is not; it names the tasks.
    """
    if not finite.all():
        names = (name for name, is_finite in zip((*labels, 'the target'), finite.tolist()) if not is_finite)
        raise NonFiniteRelationError(
            f'drtl.weighting.relation: the relation measured for {", ".join(names)} is not finite; check these tasks '
            'in datasets.train.distortions and the pairs of datasets.train.target, or choose another relation.'
        )


@dataclass(frozen=True, eq=False)
class KnowledgeGraph:
    """Auxiliary tasks and the target as nodes, their relations as edges.

    Attributes:
        labels (tuple[str, ...]): Names of the N auxiliary tasks.
        edges (Tensor): ``(N + 1, N + 1)``, symmetric, in [-1, 1]; the last row and column are the target's.

    Raises:
        NonFiniteRelationError: If an edge is NaN or infinite; it names the tasks.
    """

    labels: tuple[str, ...]
    edges: Tensor

    def __post_init__(self) -> None:
        require_finite(self.labels, self.edges[:-1].isfinite().all(dim=1))

    @property
    def relation(self) -> Tensor:
        """``r_i``: relation of each auxiliary task to the target, ``(N,)``."""
        return self.edges[-1, :-1]

    def save(self, path: str | Path, weights: Tensor) -> None:
        """Write nodes, edges and weights as JSON."""
        content = {
            'labels': list(self.labels),
            'relation': self.relation.tolist(),
            'weights': weights.tolist(),
            'edges': self.edges.tolist(),
        }
        Path(path).write_text(json.dumps(content, indent=1), encoding='utf-8')

    def draw(self, path: str | Path, weights: Tensor, fixed_share: float | None = None) -> None:
        """Write a picture: the target in the middle, the tasks around it, closer the more related they are.

        Node area grows with weight, node colour is relation, orange lines join each task to the task that it is most
        related to.

        Args:
            path (str | Path): File to write; its suffix says the format.
            weights (Tensor): ``(N,)``.
            fixed_share (float | None): Share of the total weight, in [0, 1], that the last task receives whatever its
                relation; that task is drawn as a square, and its label gives the share.
        """
        from matplotlib.figure import Figure  # without pyplot no display and no global state are involved
        from matplotlib.lines import Line2D

        num = len(self.labels)
        relation = self.relation.tolist()
        angles = [2 * math.pi * i / num for i in range(num)]
        radii = [1.6 - r for r in relation]
        points = [(radius * math.cos(a), radius * math.sin(a)) for radius, a in zip(radii, angles)]
        captions = [f'{label}\n×{weight:.2f}' for label, weight in zip(self.labels, weights.tolist())]
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
            axes.plot(*zip((0, 0), points[i]), color='0.8', linewidth=0.3 + 2 * max(relation[i], 0), zorder=1)
            nearest = max((j for j in range(num) if j != i), key=lambda j: self.edges[i, j], default=i)
            axes.plot(*zip(points[i], points[nearest]), color='tab:orange', alpha=0.5, linewidth=1, zorder=1)
        text: dict[str, Any] = {
            'textcoords': 'offset points',
            'ha': 'center',
            'parse_math': False,
            'bbox': {'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.6, 'pad': 0},
            'zorder': 4,
        }
        for point, r, weight, caption, style in zip(points, relation, weights.tolist(), captions, styles):
            area = 40 + 220 * weight
            nodes = axes.scatter(
                *point, s=area, c=[r], cmap='viridis', vmin=-1, vmax=1, zorder=2, clip_on=False, **style
            )
            above = (0, 4 + math.sqrt(area / math.pi))  # area is in points², as matplotlib's markers are
            axes.annotate(caption, point, above, fontsize=8, **text)
        axes.scatter([0], [0], s=260, color='tab:red', marker='*', zorder=3)
        axes.annotate('target', (0, 0), (0, 10), **text)
        axes.legend(handles=keys, loc='upper center', bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, fontsize=9)
        figure.colorbar(nodes, ax=axes, label='relation to the target', shrink=0.6)
        figure.savefig(path, dpi=120, bbox_inches='tight')


def graph_from_embeddings(labels: list[str], auxiliary: Tensor, target: Tensor) -> KnowledgeGraph:
    """Knowledge graph of distortion embeddings, ``r_ij = cos(v_i - v̄, v_j - v̄)``.

    The embeddings are centred over the library (``v̄`` is the mean of the auxiliary ones): what all of them share
    says nothing about how they relate.

    Args:
        labels (list[str]): Names of the N auxiliary tasks.
        auxiliary (Tensor): ``(N, d)``.
        target (Tensor): ``(d,)``.

    Returns:
        KnowledgeGraph

    Raises:
        NonFiniteRelationError: If an embedding is NaN or infinite; it names the task, or the target.
    """
    embeddings = torch.cat([auxiliary, target[None]])
    require_finite(labels, embeddings.isfinite().all(dim=1))  # centring would spread NaN to all tasks
    centred = embeddings - auxiliary.mean(dim=0)
    nodes = F.normalize(centred.double(), dim=1)
    return KnowledgeGraph(tuple(labels), (nodes @ nodes.T).clamp(-1, 1).float().cpu())


def uniform_graph(labels: list[str]) -> KnowledgeGraph:
    """A graph that relates all tasks equally to the target: the baseline without relation."""
    return KnowledgeGraph(tuple(labels), torch.eye(len(labels) + 1))


def effective_number(weights: Tensor) -> float:
    """``exp(entropy)`` of weights ``(N,)``: N where they are equal, 1 where one task has them all."""
    p = weights.double() / weights.double().sum()
    return math.exp(-torch.xlogy(p, p).sum().item())


def relation_weights(
    relation: Tensor, effective_tasks: float = 6.0, temperature: float | None = None, floor: float = 0.0
) -> Tensor:
    """``w = N [(1 - φ) softmax(r / τ) + φ / N]``: gradient weights of mean 1.

    The paper (arXiv 2111.13078) names gradient weighting; the softmax is our reconstruction, floor and effective number
    of tasks are ours.

    A fixed temperature means something else for each estimator's scale of r; the effective number of tasks,
    ``exp(entropy(softmax(r / τ)))``, does not. So τ is solved for from it where it is not given.

    Args:
        relation (Tensor): r, ``(N,)``.
        effective_tasks (float): Wanted effective number of tasks before the floor; N or more gives equal weights.
        temperature (float | None): τ; takes the place of ``effective_tasks``.
        floor (float): φ, the share that is spread evenly, in [0, 1].

    Returns:
        Tensor: ``(N,)``, mean 1.
    """
    r = relation.double()
    num = len(r)
    if temperature is None:
        softmax = _softmax_of_effective_number(r, min(effective_tasks, num))
    else:
        softmax = torch.softmax(r / temperature, dim=0)
    return (num * (1 - floor) * softmax + floor).to(relation.dtype)


def _softmax_of_effective_number(r: Tensor, effective_tasks: float) -> Tensor:
    """Bisect over log τ: the effective number grows with τ, from the number of maxima to N."""
    spread = (r.max() - r.min()).item()
    if spread == 0 or effective_tasks >= len(r):
        return torch.full_like(r, 1 / len(r))
    low, high = math.log(spread) - 10, math.log(spread) + 10
    for _ in range(60):
        middle = (low + high) / 2
        if effective_number(torch.softmax(r / math.exp(middle), dim=0)) < effective_tasks:
            low = middle
        else:
            high = middle
    return torch.softmax(r / math.exp(high), dim=0)


def relation_table(graph: KnowledgeGraph, weights: Tensor) -> str:
    """The tasks by weight: name, relation to the target, gradient weight, and a bar for the weight."""
    rows = sorted(zip(weights.tolist(), graph.relation.tolist(), graph.labels), reverse=True)
    width = max(len(label) for label in graph.labels)
    most = rows[0][0]
    lines = [
        f'  {label:<{width}}  {relation:+.2f}  x{weight:.2f}  {"#" * round(30 * weight / most)}'
        for weight, relation, label in rows
    ]
    lines.append(f'  {effective_number(weights):.1f} effective of {len(rows)} tasks')
    return '\n'.join(lines)
