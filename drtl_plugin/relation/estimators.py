"""How relations are obtained: estimators that make a knowledge graph of auxiliary pairs and the target's pairs.

========== ======================================= ===================================== ==========================
estimator  relation of task i to the target        cost of a measurement                 right when
========== ======================================= ===================================== ==========================
embedding  cosine of DRN embeddings (the paper's)  one DRN pass over the evidence; the   the library holds something
                                                   DRN's training once (a minute)        that looks like the camera
gradient   cosine of gradients at the current θ    N + 1 gradients, all in memory, some  θ is half trained; noisy
                                                   copies of them in double precision
transfer   what learning task i gains on the       N times ``transfer_steps`` gradient   what helps counts, whatever
           target's pairs                          steps; N (N + 1) losses               it looks like
uniform    all alike                               nothing                               a baseline is wanted
========== ======================================= ===================================== ==========================

``benchmarks/README.md`` has measurements of each. One of your own is a function with the decorator
:func:`relation_estimator`; ``docs/extending.md`` has an example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drtl_plugin.errors import OptionError
from drtl_plugin.meta.learner import Criterion, Precision, gradients_of, trainable_parameters
from drtl_plugin.relation.graph import KnowledgeGraph, graph_from_embeddings, require_finite, uniform_graph
from drtl_plugin.runtime.progress import progress
from drtl_plugin.tasks.distortions import bicubic


@dataclass(frozen=True, eq=False)
class RelationEvidence:
    """Pairs that an estimator looks at.

    Attributes:
        auxiliary_lq (Tensor): ``(N, P, 3, h, w)``: the same P contents under each task.
        auxiliary_gt (Tensor): ``(P, 3, s h, s w)``: the contents.
        target_lq, target_gt (Tensor): ``(Q, 3, h, w)`` and ``(Q, 3, s h, s w)``: patches of the support pairs.
    """

    auxiliary_lq: Tensor
    auxiliary_gt: Tensor
    target_lq: Tensor
    target_gt: Tensor


@dataclass(frozen=True, eq=False)
class RelationQuestion:
    """What an estimator may use; each uses what it needs.

    Attributes:
        labels (list[str]): The N auxiliary tasks.
        draw_evidence (Callable[[], RelationEvidence]): Draws pairs; not free.
        net_r (nn.Module | None): A trained :class:`DistortionRelationNet` in evaluation mode.
        net_g (nn.Module): The restoration network at the current θ; not changed.
        criterion (Criterion): Its loss.
        transfer_steps (int), transfer_lr (float): Adam steps on each task, and their size (``transfer``).
        precision (Precision): What the network is computed in.
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

# By the name that `drtl.weighting.relation` chooses.
ESTIMATORS: dict[str, RelationEstimator] = {}
# Those that ask the restoration network, which has to have learned something before.
NEED_TRAINED_NETWORK: set[str] = set()


def relation_estimator(
    name: str, needs_trained_network: bool = False
) -> Callable[[RelationEstimator], RelationEstimator]:
    """Register a relation estimator: the decorator of a function of a :class:`RelationQuestion`.

    Args:
        name (str): What ``drtl.weighting.relation`` calls it.
        needs_trained_network (bool): Whether it asks ``net_g``: then it is not asked before the first training step,
            unless that begins from ``path.pretrain_network_g``.

    Returns:
        Callable: The decorator; it returns the function as it is.

    Raises:
        OptionError: If there is an estimator of this name.
    """

    def register(estimate: RelationEstimator) -> RelationEstimator:
        if name in ESTIMATORS:
            raise OptionError(
                f'relation estimator {name!r} of {estimate.__module__}: there is one of this name in '
                f'{ESTIMATORS[name].__module__}; choose another name.'
            )
        ESTIMATORS[name] = estimate
        if needs_trained_network:
            NEED_TRAINED_NETWORK.add(name)
        return estimate

    return register


def _by_task(evidence: RelationEvidence) -> Iterator[Tensor]:
    """``auxiliary_lq`` task by task, ``(P, 3, h, w)``, with progress shown."""
    return progress(evidence.auxiliary_lq, 'relation', len(evidence.auxiliary_lq), 'task')


@torch.no_grad()
def mean_embedding(net_r: nn.Module, lq: Tensor, gt: Tensor) -> Tensor:
    """``v_i``: mean embedding of patches beside their reduced ground truth.

    Args:
        net_r (nn.Module): A :class:`DistortionRelationNet`, in evaluation mode.
        lq (Tensor): ``(B, 3, h, w)`` in [0, 1].
        gt (Tensor): ``(B, 3, s h, s w)`` in [0, 1].

    Returns:
        Tensor: ``(d,)``.
    """
    return net_r(lq, bicubic(gt, gt.shape[-1] // lq.shape[-1])).mean(dim=0)


@relation_estimator('embedding')
def embedding_relation(question: RelationQuestion) -> KnowledgeGraph:
    """Cosines between the tasks' mean embeddings.

    The paper (arXiv 2111.13078) names a Distortion Relation Network, a memory bank and cosine similarity; their form
    here is our reconstruction.
    """
    assert question.net_r is not None
    evidence = question.draw_evidence()
    auxiliary = [mean_embedding(question.net_r, lq, evidence.auxiliary_gt) for lq in _by_task(evidence)]
    target = mean_embedding(question.net_r, evidence.target_lq, evidence.target_gt)
    return graph_from_embeddings(question.labels, torch.stack(auxiliary), target)


def mean_gradient(
    net_g: nn.Module, criterion: Criterion, lq: Tensor, gt: Tensor, precision: Precision = nullcontext
) -> Tensor:
    """``∇L_i(θ)`` of patches ``(B, …)``, all parameters in one vector ``(D,)``."""
    with precision():
        loss = criterion(net_g(lq), gt)
    gradients = gradients_of(loss, list(trainable_parameters(net_g).values()))
    return torch.cat([gradient.flatten() for gradient in gradients])


@relation_estimator('gradient', needs_trained_network=True)
def gradient_relation(question: RelationQuestion) -> KnowledgeGraph:
    """Cosines between the tasks' gradients at the current θ, centred over the library as embeddings are.

    Where two tasks want θ to move the same way, a step on one helps the other.
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
    """``θ_i``: a copy of the network that has taken Adam steps on pairs ``(B, …)`` of a task, in their order."""
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


@relation_estimator('transfer', needs_trained_network=True)
def transfer_relation(question: RelationQuestion) -> KnowledgeGraph:
    """How much better a network restores the target's pairs after it has learned task i for a while.

    Of the gains ``log L_j(θ) - log L_j(θ_i)``, centred over i, edges are the mean of both directions (between
    auxiliary tasks; the target is not learned from), as shares of the largest in absolute value. Half of the
    contents are learned from; the target's pairs, and up to 8 contents of the other half, are judged by.
    """
    evidence = question.draw_evidence()
    gt, half = evidence.auxiliary_gt, len(evidence.auxiliary_gt) // 2
    # N² judgements between tasks are for the picture only; those of the target make the weights.
    other = slice(half, half + 8)
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
    # What θ itself scored cancels out in the centring.
    return graph_from_gains(question.labels, -torch.stack(rows))


def graph_from_gains(labels: list[str], gains: Tensor) -> KnowledgeGraph:
    """Knowledge graph of what learning task i, a row, gains on task j, a column; the last column is the target's.

    Args:
        labels (list[str]): Names of the N auxiliary tasks.
        gains (Tensor): ``(N, N + 1)``.

    Raises:
        NonFiniteRelationError: If a gain is NaN or infinite; it names the task, or the target.
    """
    finite = gains.isfinite()
    # Where every gain on a task is broken, that task is to blame, and not those that were learned.
    judged = finite.any(dim=0)
    learned = (finite | ~judged).all(dim=1)
    require_finite(labels, torch.cat([judged[:-1] & learned, judged[-1:]]))
    gains = gains - gains.mean(dim=0)
    between, target = gains[:, :-1], gains[:, -1:]
    between = (between + between.T) / 2
    between = between / between.abs().max().clamp_min(1e-12)
    target = target / target.abs().max().clamp_min(1e-12)
    one = torch.ones(1, 1, device=gains.device)
    edges = torch.cat([torch.cat([between, target], dim=1), torch.cat([target.T, one], dim=1)])
    return KnowledgeGraph(tuple(labels), edges.fill_diagonal_(1).float().cpu())


@relation_estimator('uniform')
def uniform_relation(question: RelationQuestion) -> KnowledgeGraph:
    """All tasks relate alike: the baseline."""
    return uniform_graph(question.labels)
