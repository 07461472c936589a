import pytest
import torch
from torch import nn

from drtl_plugin.data.distortions import bicubic
from drtl_plugin.relation.estimators import ESTIMATORS, RelationEvidence, embed_pairs


class MeanResidual(nn.Module):
    """An embedding that can be worked out by hand: mean of the picture, and of its residual."""

    def forward(self, lq, reduced_gt):
        return torch.stack([lq.mean(dim=(1, 2, 3)), (lq - reduced_gt).mean(dim=(1, 2, 3))], dim=1)


def evidence(generator) -> RelationEvidence:
    gt = torch.rand(3, 3, 16, 16, generator=generator)
    lq = torch.stack([bicubic(gt, 4) + shift for shift in (-0.1, 0.0, 0.1)])
    return RelationEvidence(lq, gt, bicubic(gt, 4) + 0.05, gt)


def test_embedding_relation_orders_tasks_by_cosine(generator):
    net = MeanResidual().train()
    graph = ESTIMATORS['embedding'](['darker', 'same', 'brighter'], lambda: evidence(generator), net)
    # About the library's mean, tasks lie at -0.1, 0, 0.1 along (1, 1), and the target at +0.05.
    assert graph.labels == ('darker', 'same', 'brighter')
    assert graph.relation[[0, 2]].tolist() == torch.tensor([-1.0, 1.0]).tolist()
    assert net.training  # left as it was


def test_embed_pairs_reduces_the_ground_truth(generator):
    gt = torch.rand(2, 3, 16, 16, generator=generator)
    assert torch.allclose(embed_pairs(MeanResidual(), bicubic(gt, 4), gt)[:, 1], torch.zeros(2), atol=1e-7)


def test_uniform_relation_needs_neither_evidence_nor_network():
    graph = ESTIMATORS['uniform'](['a', 'b', 'c'], lambda: pytest.fail('evidence was drawn'), None)
    assert torch.equal(graph.relation, torch.zeros(3))
