"""How relations are obtained: estimators that make a knowledge graph of auxiliary pairs and the target's pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drtl_plugin.data.distortions import bicubic
from drtl_plugin.relation.graph import KnowledgeGraph, graph_from_embeddings, uniform_graph


@dataclass(frozen=True)
class RelationEvidence:
    """What an estimator looks at.

    Attributes:
        auxiliary_lq (Tensor): ``(N, P, 3, h, w)``: the same P contents under each task.
        auxiliary_gt (Tensor): ``(P, 3, s h, s w)``: the contents.
        target_lq, target_gt (Tensor): ``(Q, 3, h, w)`` and ``(Q, 3, s h, s w)``: patches of the support pairs.
    """

    auxiliary_lq: Tensor
    auxiliary_gt: Tensor
    target_lq: Tensor
    target_gt: Tensor


def embed_pairs(net: nn.Module, lq: Tensor, gt: Tensor) -> Tensor:
    """Embeddings of patches beside their reduced ground truth.

    Args:
        net (nn.Module): A :class:`DistortionRelationNet`.
        lq (Tensor): ``(B, 3, h, w)`` in [0, 1].
        gt (Tensor): ``(B, 3, s h, s w)`` in [0, 1].

    Returns:
        Tensor: ``(B, d)``.
    """
    return net(lq, bicubic(gt, gt.shape[-1] // lq.shape[-1]))


# estimator(labels of the N tasks, draws evidence, DRN) -> graph. Evidence is costly: drawn by those who need it.
RelationEstimator = Callable[[list[str], Callable[[], RelationEvidence], nn.Module], KnowledgeGraph]


@torch.no_grad()
def embedding_relation(labels: list[str], draw: Callable[[], RelationEvidence], net: nn.Module) -> KnowledgeGraph:
    """The paper's relation: cosines between the tasks' mean embeddings (arXiv 2111.13078, knowledge graph).

    Costs one forward pass of the DRN over the evidence. It judges what a distortion looks like, and is right as far
    as the library holds something that looks like the camera.
    """
    evidence = draw()
    training = net.training
    net.eval()
    auxiliary = torch.stack([embed_pairs(net, lq, evidence.auxiliary_gt).mean(0) for lq in evidence.auxiliary_lq])
    target = embed_pairs(net, evidence.target_lq, evidence.target_gt).mean(0)
    net.train(training)
    return graph_from_embeddings(labels, auxiliary, target)


def uniform_relation(labels: list[str], draw: Callable[[], RelationEvidence], net: nn.Module | None) -> KnowledgeGraph:
    """All tasks relate alike: the baseline. Costs nothing."""
    return uniform_graph(labels)


# By the name that `drtl.weighting.relation` chooses.
ESTIMATORS: dict[str, RelationEstimator] = {'embedding': embedding_relation, 'uniform': uniform_relation}
