import copy
import dataclasses

import pytest
import torch
from torch import nn

from drtl_plugin.errors import DataError
from drtl_plugin.relation.estimators import (
    ESTIMATOR_REGISTRY,
    RelationEvidence,
    RelationQuestion,
    graph_from_gains,
    learn_task,
    mean_embedding,
    mean_gradient,
)
from drtl_plugin.tasks.distortions import bicubic

LABELS = ['darker', 'same', 'brighter']


class MeanResidual(nn.Module):
    """An embedding that can be worked out by hand: mean of the picture, and of its residual."""

    def forward(self, lq, reduced_gt):
        return torch.stack([lq.mean(dim=(1, 2, 3)), (lq - reduced_gt).mean(dim=(1, 2, 3))], dim=1)


class Offset(nn.Module):
    """Restores by adding one number, after enlarging: what brightness tasks teach can be worked out by hand."""

    def __init__(self, offset: float = 0.0):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset))

    def forward(self, lq):
        return nn.functional.interpolate(lq, scale_factor=4) + self.offset


class Rote(nn.Module):
    """Memorises images: adds a number to each, which it recognises by its brightness."""

    def __init__(self):
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(4))

    def forward(self, lq):
        known = (4 * lq.mean(dim=(1, 2, 3))).long()
        return nn.functional.interpolate(lq, scale_factor=4) + self.offsets[known][:, None, None, None]


def question(target_shift: float = 0.05, net_g: nn.Module | None = None, **settings) -> RelationQuestion:
    """Flat pictures under three tasks that shift brightness, and a target that does."""
    gt = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(4, 3, 16, 16)
    lq = torch.stack([bicubic(gt, 4) + shift for shift in (-0.1, 0.0, 0.1)])
    evidence = RelationEvidence(lq, gt, bicubic(gt, 4) + target_shift, gt)
    return RelationQuestion(LABELS, lambda: evidence, MeanResidual(), net_g or Offset(), nn.MSELoss(), **settings)


def test_embedding_relation_orders_tasks_by_cosine():
    graph = ESTIMATOR_REGISTRY.get('embedding')(question())
    # About the library's mean, tasks lie at -0.1, 0, 0.1 along (1, 1), and the target at +0.05.
    assert graph.labels == tuple(LABELS)
    assert graph.relation[[0, 2]].tolist() == pytest.approx([-1.0, 1.0], abs=1e-5)


class Predictor(MeanResidual):
    """Predicts that a task helps a target the more, the closer their mean residuals are."""

    def gains(self, auxiliary, target):
        return -(auxiliary[:, None, 1] - 0.9 * target[None, :, 1]).abs()


def test_predicted_transfer_is_the_drns_prediction():
    asked = question(target_shift=0.05)
    graph = ESTIMATOR_REGISTRY.get('predicted_transfer')(dataclasses.replace(asked, net_r=Predictor()))
    # Residuals -0.1, 0 and 0.1, and 0.9 times the target's 0.05; strengths are kept.
    assert graph.relation.tolist() == pytest.approx([-0.145, -0.045, -0.055], abs=1e-4)
    # Both directions between the first two tasks: |-0.1 - 0| and |0 + 0.09|.
    assert graph.edges[0, 1].item() == graph.edges[1, 0].item() == pytest.approx(-0.095, abs=1e-4)


def test_predicted_transfer_needs_a_drn_that_predicts():
    with pytest.raises(ValueError, match='needs a DRN with a method gains'):
        ESTIMATOR_REGISTRY.get('predicted_transfer')(question())


def test_mean_embedding_reduces_the_ground_truth(generator):
    gt = torch.rand(2, 3, 16, 16, generator=generator)
    lq = bicubic(gt, 4)
    assert mean_embedding(MeanResidual(), lq, gt).tolist() == pytest.approx([lq.mean().item(), 0], abs=1e-6)


def test_mean_gradient_is_that_of_backward(generator):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 3, 3, 1, 1))
    lq, gt = torch.rand(2, 2, 3, 8, 8, generator=generator)
    gradient = mean_gradient(net, nn.L1Loss(), lq, gt)
    nn.functional.l1_loss(net(lq), gt).backward()
    assert torch.equal(gradient, torch.cat([p.grad.flatten() for p in net.parameters()]))


@pytest.mark.parametrize('relation', ['gradient', 'transfer'])
@pytest.mark.parametrize('shift', [-0.08, 0.08])
def test_what_moves_the_network_alike_relates(relation, shift):
    graph = ESTIMATOR_REGISTRY.get(relation)(question(shift, transfer_steps=5, transfer_lr=1e-2))
    best = 0 if shift < 0 else 2
    assert graph.relation.argmax() == best
    assert graph.relation.argmin() == 2 - best
    assert torch.equal(graph.edges, graph.edges.T)
    assert graph.edges.diagonal().tolist() == [1, 1, 1, 1]
    assert graph.edges.abs().max() <= 1 + 1e-6


def test_memorised_images_do_not_transfer():
    """The losses between auxiliary tasks are those on pictures that no task was learned from."""
    gt = torch.tensor([1.0, 3, 5, 7]).view(4, 1, 1, 1).expand(4, 3, 16, 16) / 8
    lq = torch.stack([bicubic(gt, 4) + shift for shift in (-0.1, 0.1)])
    evidence = RelationEvidence(lq, gt, lq[1], gt)
    ask = RelationQuestion(['darker', 'brighter'], lambda: evidence, None, Rote(), nn.MSELoss(), 5, 1e-2)
    graph = ESTIMATOR_REGISTRY.get('transfer')(ask)
    assert torch.equal(graph.edges[:2, :2], torch.eye(2))
    assert graph.relation.tolist() == pytest.approx([-1, 1], abs=1e-3)  # the target shows what was learned


@pytest.mark.parametrize('relation', ['gradient', 'transfer'])
def test_estimators_leave_the_network_alone(relation):
    net = nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    before = copy.deepcopy(net.state_dict())
    ESTIMATOR_REGISTRY.get(relation)(question(net_g=net))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert net.training
    assert all(p.grad is None for p in net.parameters())


def test_learning_a_task_is_adam_on_its_pairs_in_turn():
    lq = torch.rand(3, 3, 4, 4)
    gt = nn.functional.interpolate(lq, scale_factor=4) + 0.5
    # On a constant sign of the gradient, Adam's steps are of size lr.
    net = learn_task(Offset(), nn.L1Loss(), lq, gt, steps=4, lr=0.01, batch_size=2)
    assert net.offset.item() == pytest.approx(0.04, rel=1e-4)


def test_gains_become_edges():
    gains = torch.tensor([[3.0, 1.0, 0.5], [-1.0, 1.0, 0.1]])  # last column: the target's
    graph = graph_from_gains(['a', 'b'], gains)
    # centred by column: [[2, 0, 0.2], [-2, 0, -0.2]]; between a and b the mean of 0 and -2, of at most 2
    expected = torch.tensor([[1.0, -0.5, 1.0], [-0.5, 1.0, -1.0], [1.0, -1.0, 1.0]])
    assert torch.allclose(graph.edges, expected)


@pytest.mark.parametrize(
    ('place', 'names'),
    [
        ((1, 0), 'b'),  # what learned b is bad at a
        ((1, slice(None)), 'b'),  # learning b has diverged
        ((slice(None), 0), 'a'),  # nobody can be judged on a
        ((slice(None), 3), 'the target'),
        ((slice(0, 2), slice(None)), 'a, b'),
    ],
)
def test_only_the_tasks_whose_gains_are_bad_are_named(place, names):
    gains = torch.rand(3, 4)
    gains[place] = float('nan')
    with pytest.raises(DataError, match=f'the relation measured for {names} is not finite'):
        graph_from_gains(['a', 'b', 'c'], gains)


def test_uniform_relation_needs_neither_evidence_nor_network():
    ask = RelationQuestion(['a', 'b', 'c'], lambda: pytest.fail('evidence was drawn'), None, None, None)
    assert torch.equal(ESTIMATOR_REGISTRY.get('uniform')(ask).relation, torch.zeros(3))
