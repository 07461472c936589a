"""The knowledge graph: auxiliary tasks and the target as nodes, relations as edges.

The paper (arXiv 2111.13078) names a knowledge graph and cosine similarity. Centring the embeddings over the library
before taking cosines is ours. :mod:`drtl_plugin.relation.weights` turns relations into gradient weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from drtl_plugin.errors import DataError


class NonFiniteRelationError(DataError):
    """A relation is NaN or infinite, so it gives no weights."""


def require_finite(labels: Iterable[str], finite: Tensor) -> None:
    """Raise an error unless all relations are finite.

    Args:
        labels (Iterable[str]): Names of the N auxiliary tasks.
        finite (Tensor): Boolean, whether each task's measurement is finite: ``(N,)``, or ``(N + 1,)`` with the
            target's last.

    Raises:
        NonFiniteRelationError: If one is not; it names the tasks.
    """
    if not finite.all():
        # ``finite`` may lack the target.
        nodes = zip((*labels, 'the target'), finite.tolist(), strict=False)
        names = ', '.join(name for name, is_finite in nodes if not is_finite)
        raise NonFiniteRelationError(f'the relation measured for {names} is not finite.')


@dataclass(frozen=True, eq=False)
class KnowledgeGraph:
    """Relations between auxiliary tasks and the target.

    Attributes:
        labels (tuple[str, ...]): Names of the N auxiliary tasks.
        edges (Tensor): ``(N + 1, N + 1)``, symmetric, in [-1, 1]; the last row and column belong to the target.

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


def graph_from_embeddings(labels: Sequence[str], auxiliary: Tensor, target: Tensor) -> KnowledgeGraph:
    """Knowledge graph of distortion embeddings, ``r_ij = cos(v_i - v̄, v_j - v̄)``.

    The embeddings are centred over the library (``v̄`` is the mean of the auxiliary ones), to remove what all tasks have
    in common.

    Args:
        labels (Sequence[str]): Names of the N auxiliary tasks.
        auxiliary (Tensor): ``(N, d)``.
        target (Tensor): ``(d,)``.

    Raises:
        NonFiniteRelationError: If an embedding is NaN or infinite; it names the task, or the target.
    """
    embeddings = torch.cat([auxiliary, target[None]])
    require_finite(labels, embeddings.isfinite().all(dim=1))  # before centring, which would spread NaN to all tasks
    centred = embeddings - auxiliary.mean(dim=0)
    nodes = F.normalize(centred.double(), dim=1)
    return KnowledgeGraph(tuple(labels), (nodes @ nodes.T).clamp(-1, 1).float().cpu())


def uniform_graph(labels: Sequence[str]) -> KnowledgeGraph:
    """A graph in which all tasks relate equally to the target: the baseline."""
    return KnowledgeGraph(tuple(labels), torch.eye(len(labels) + 1))
