"""Relation estimators: functions that build a knowledge graph from auxiliary pairs and the target's pairs.

========== ============================= ====================================== =================================
estimator  relation of task i to target  cost of a measurement                  use when
========== ============================= ====================================== =================================
embedding  cosine of DRN embeddings      one DRN pass over the evidence, plus   the library has a distortion that
           (the paper's)                 training the DRN once (a minute)       looks like the camera's
predicted_ transfer, predicted by a DRN  one DRN pass over the evidence         tasks that help matter more than
transfer   that is shipped (ours)                                               tasks that look alike
gradient   cosine of gradients at the    N + 1 gradients, held in memory (some  the network is half trained;
           current θ (ours)              in float64)                            noisy
transfer   gain on the target's pairs    N × ``transfer_steps`` training        tasks that help matter more than
           after learning task i (ours)  steps, N (N + 1) losses                tasks that look alike
uniform    the same for all              none                                   you need a baseline
========== ============================= ====================================== =================================

``benchmarks/README.md`` has measurements, and ``docs/extending.md`` an example of your own estimator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from basicsr.utils.registry import Registry
from torch import Tensor, nn

from drtl_plugin.meta.learner import Criterion, Precision, gradients_of, trainable_parameters
from drtl_plugin.relation.graph import KnowledgeGraph, graph_from_embeddings, require_finite, uniform_graph
from drtl_plugin.runtime.progress import progress
from drtl_plugin.tasks.distortions import bicubic


@dataclass(frozen=True, eq=False)
class RelationEvidence:
    """Pairs that a relation is measured on.

    Attributes:
        auxiliary_lq (Tensor): ``(N, P, 3, h, w)``: the same P GT patches under each of N tasks.
        auxiliary_gt (Tensor): ``(P, 3, s h, s w)``: these GT patches.
        target_lq, target_gt (Tensor): ``(Q, 3, h, w)`` and ``(Q, 3, s h, s w)``: patches of the support pairs.
    """

    auxiliary_lq: Tensor
    auxiliary_gt: Tensor
    target_lq: Tensor
    target_gt: Tensor


@dataclass(frozen=True, eq=False)
class RelationQuestion:
    """The arguments of an estimator; each uses what it needs.

    Attributes:
        labels (list[str]): Names of the N auxiliary tasks.
        draw_evidence (Callable[[], RelationEvidence]): Draws pairs (takes time).
        net_r (nn.Module | None): A trained :class:`DistortionRelationNet` in evaluation mode.
        net_g (nn.Module): The restoration network at the current θ; must not be changed.
        criterion (Criterion): The loss of ``net_g``.
        transfer_steps (int), transfer_lr (float): Adam steps on each task, and learning rate, for ``transfer``.
        precision (Precision): Autocast context for ``net_g``.
    """

    labels: list[str]
    draw_evidence: Callable[[], RelationEvidence]
    net_r: nn.Module | None
    net_g: nn.Module
    criterion: Criterion
    transfer_steps: int = 20
    transfer_lr: float = 1e-4
    precision: Precision = nullcontext


RelationEstimator = Callable[[RelationQuestion], KnowledgeGraph]

# Option files choose an estimator by the name of its function.
ESTIMATOR_REGISTRY = Registry('relation estimator')


def asks_network(estimate: RelationEstimator) -> RelationEstimator:
    """Mark an estimator whose relation depends on ``net_g``, so that it needs a network that has learned something.

    Such an estimator is not used before the first training step, unless training starts from a pre-trained network.
    """
    estimate.asks_network = True  # type: ignore[attr-defined]
    return estimate


def needs_trained_network(name: str) -> bool:
    """Whether the registered estimator ``name`` is marked by :func:`asks_network`."""
    return getattr(ESTIMATOR_REGISTRY.get(name), 'asks_network', False)


def asks_drn(shipped: str | None = None) -> Callable[[RelationEstimator], RelationEstimator]:
    """Mark an estimator that needs ``net_r``.

    Args:
        shipped (str | None): Architecture that is used with the weights in this package, unless an option file names
            another DRN; None: option files must name one.
    """

    def mark(estimate: RelationEstimator) -> RelationEstimator:
        estimate.asks_drn, estimate.shipped_drn = True, shipped  # type: ignore[attr-defined]
        return estimate

    return mark


def needs_drn(name: str) -> bool:
    """Whether the registered estimator ``name`` is marked by :func:`asks_drn`."""
    return getattr(ESTIMATOR_REGISTRY.get(name), 'asks_drn', False)


def shipped_drn(name: str) -> str | None:
    """The architecture that the registered estimator ``name`` uses with shipped weights, if any."""
    return getattr(ESTIMATOR_REGISTRY.get(name), 'shipped_drn', None)


def _by_task(evidence: RelationEvidence) -> Iterator[Tensor]:
    """Iterate over ``auxiliary_lq`` by task, ``(P, 3, h, w)``, showing progress."""
    return progress(evidence.auxiliary_lq, 'relation', len(evidence.auxiliary_lq), 'task')


@torch.no_grad()
def mean_embedding(net_r: nn.Module, lq: Tensor, gt: Tensor) -> Tensor:
    """``v_i``: mean embedding of LQ patches and their reduced GT.

    Args:
        net_r (nn.Module): A :class:`DistortionRelationNet`, in evaluation mode.
        lq (Tensor): ``(B, 3, h, w)`` in [0, 1].
        gt (Tensor): ``(B, 3, s h, s w)`` in [0, 1].

    Returns:
        Tensor: ``(d,)``.
    """
    return net_r(lq, bicubic(gt, gt.shape[-1] // lq.shape[-1])).mean(dim=0)


def _embeddings(net_r: nn.Module, evidence: RelationEvidence) -> tuple[Tensor, Tensor]:
    """The auxiliary tasks' mean embeddings ``(N, d)``, and the target's ``(d,)``."""
    auxiliary = [mean_embedding(net_r, lq, evidence.auxiliary_gt) for lq in _by_task(evidence)]
    return torch.stack(auxiliary), mean_embedding(net_r, evidence.target_lq, evidence.target_gt)


@ESTIMATOR_REGISTRY.register()
@asks_drn()
def embedding(question: RelationQuestion) -> KnowledgeGraph:
    """Cosines between the tasks' mean embeddings.

    The paper (arXiv 2111.13078) names a Distortion Relation Network, a memory bank and cosine similarity; their form
    here is our reconstruction.

    Raises:
        ValueError: If ``question.net_r`` is None.
    """
    if question.net_r is None:
        raise ValueError('the embedding relation needs a Distortion Relation Network.')
    return graph_from_embeddings(question.labels, *_embeddings(question.net_r, question.draw_evidence()))


@ESTIMATOR_REGISTRY.register()
@asks_drn(shipped='TransferRelationNet')
def predicted_transfer(question: RelationQuestion) -> KnowledgeGraph:
    """Transfer from each task to the target, and between tasks, as a DRN predicts it from pairs (ours).

    Edges between auxiliary tasks are the mean of both directions. Edges are in units of the logarithm of a loss and
    are not rescaled, so a camera to which all tasks relate alike gets small ones.

    Raises:
        ValueError: If ``question.net_r`` is not a DRN that predicts gains, as
            :class:`~drtl_plugin.archs.drn_arch.TransferRelationNet` does.
    """
    net_r, predict = question.net_r, getattr(question.net_r, 'gains', None)
    if net_r is None or predict is None:
        raise ValueError('the predicted_transfer relation needs a DRN with a method gains, e.g. TransferRelationNet.')
    auxiliary, target = _embeddings(net_r, question.draw_evidence())
    nodes = torch.cat([auxiliary, target[None]])
    require_finite(question.labels, nodes.isfinite().all(dim=1))
    with torch.no_grad():
        gains = predict(auxiliary, nodes)
    between = (gains[:, :-1] + gains[:, :-1].T) / 2
    return _graph(question.labels, between.clamp(-1, 1), gains[:, -1:].clamp(-1, 1))


def mean_gradient(
    net_g: nn.Module, criterion: Criterion, lq: Tensor, gt: Tensor, precision: Precision = nullcontext
) -> Tensor:
    """``∇L_i(θ)`` of patches ``(B, …)``, all parameters in one vector ``(D,)``."""
    with precision():
        loss = criterion(net_g(lq), gt)
    gradients = gradients_of(loss, list(trainable_parameters(net_g).values()))
    return torch.cat([gradient.flatten() for gradient in gradients])


@ESTIMATOR_REGISTRY.register()
@asks_network
def gradient(question: RelationQuestion) -> KnowledgeGraph:
    """Cosines between the tasks' gradients at the current θ, centred over the library like embeddings (ours).

    If the gradients of two tasks point the same way, a step on one helps the other.
    """
    evidence = question.draw_evidence()
    net = copy.deepcopy(question.net_g).eval()
    pairs = ((lq, evidence.auxiliary_gt) for lq in _by_task(evidence))
    auxiliary = torch.stack([mean_gradient(net, question.criterion, *pair, question.precision) for pair in pairs])
    target = mean_gradient(net, question.criterion, evidence.target_lq, evidence.target_gt, question.precision)
    return graph_from_embeddings(question.labels, auxiliary, target)


def learn_task(
    net_g: nn.Module,
    criterion: Criterion,
    lq: Tensor,
    gt: Tensor,
    steps: int,
    lr: float,
    batch_size: int = 8,
    precision: Precision = nullcontext,
) -> nn.Module:
    """``θ_i``: train a copy of the network on pairs ``(B, …)`` of a task, in their order, with Adam."""
    net = copy.deepcopy(net_g).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for step in range(steps):
        batch = [(step * batch_size + i) % len(lq) for i in range(batch_size)]
        optimizer.zero_grad()
        with precision():
            loss = criterion(net(lq[batch]), gt[batch])
        loss.backward()
        optimizer.step()
    return net


@ESTIMATOR_REGISTRY.register()
@asks_network
def transfer(question: RelationQuestion) -> KnowledgeGraph:
    """How much better the network restores the target's pairs after some training on task i (ours).

    The gain of task i on task j is ``log L_j(θ) - log L_j(θ_i)``, centred over i. Edges between auxiliary tasks are the
    mean of both directions; all edges are divided by the largest in absolute value. Training uses half of the GT
    patches; losses are measured on the target's pairs and two patches of the other half.
    """
    evidence = question.draw_evidence()
    gt, half = evidence.auxiliary_gt, len(evidence.auxiliary_gt) // 2
    # The N² losses between tasks are only drawn; weights follow from the N on the target.
    other = slice(half, half + 2)
    judged = [(lq[other], gt[other]) for lq in evidence.auxiliary_lq] + [(evidence.target_lq, evidence.target_gt)]
    rows = []
    for lq in _by_task(evidence):
        net = learn_task(
            question.net_g,
            question.criterion,
            lq[:half],
            gt[:half],
            question.transfer_steps,
            question.transfer_lr,
            precision=question.precision,
        )
        net.eval()
        with torch.no_grad(), question.precision():
            rows.append(torch.stack([question.criterion(net(lq), gt) for lq, gt in judged]).log())
    # log L_j(θ) cancels out in the centring.
    return graph_from_gains(question.labels, -torch.stack(rows))


def graph_from_gains(labels: list[str], gains: Tensor) -> KnowledgeGraph:
    """Knowledge graph of the gains of task i (rows) on task j (columns); the last column is the target's.

    Args:
        labels (list[str]): Names of the N auxiliary tasks.
        gains (Tensor): ``(N, N + 1)``.

    Raises:
        NonFiniteRelationError: If a gain is NaN or infinite; it names the task, or the target.
    """
    finite = gains.isfinite()
    # If every gain on a task is broken, that task is the cause, not those that were trained on.
    judged = finite.any(dim=0)
    learned = (finite | ~judged).all(dim=1)
    require_finite(labels, torch.cat([judged[:-1] & learned, judged[-1:]]))
    gains = gains - gains.mean(dim=0)
    between, target = gains[:, :-1], gains[:, -1:]
    between = (between + between.T) / 2
    between = between / between.abs().max().clamp_min(1e-12)
    target = target / target.abs().max().clamp_min(1e-12)
    return _graph(labels, between, target)


def _graph(labels: list[str], between: Tensor, target: Tensor) -> KnowledgeGraph:
    """Knowledge graph of the edges between tasks, ``(N, N)``, symmetric, and those to the target, ``(N, 1)``."""
    one = torch.ones(1, 1, device=between.device)
    edges = torch.cat([torch.cat([between, target], dim=1), torch.cat([target.T, one], dim=1)])
    return KnowledgeGraph(tuple(labels), edges.fill_diagonal_(1).float().cpu())


@ESTIMATOR_REGISTRY.register()
def uniform(question: RelationQuestion) -> KnowledgeGraph:
    """The same relation for all tasks: the baseline."""
    return uniform_graph(question.labels)
