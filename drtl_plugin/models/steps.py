"""The gradient of a training step, in each of the two pipelines.

The paper (arXiv 2111.13078) names the pipelines; the formulas are our reconstruction.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from drtl_plugin.data.interface import EpisodeBatch
from drtl_plugin.meta.learner import (
    Criterion,
    Precision,
    accumulate,
    functional_loss,
    minibatches,
    outer_gradient,
    trainable_parameters,
)
from drtl_plugin.models.adversary import Adversary
from drtl_plugin.models.inner_rates import InnerRates
from drtl_plugin.options.sections import InnerOptions

# The loss between an output and its GT, a scalar, and its parts by name.
NamedLosses = Callable[[Tensor, Tensor], tuple[Tensor, Mapping[str, Tensor]]]


def pretrain_step(
    net: nn.Module,
    batch: EpisodeBatch,
    weights: Sequence[float],
    losses: NamedLosses,
    precision: Precision,
    losses_are_means: bool,
    adversary: Adversary | None,
    step: int,
) -> OrderedDict[str, Tensor]:
    """Accumulate ``g = (1/B) Σ w_i ∇L_i(θ)`` over all patches of the B episodes.

    Args:
        net (nn.Module): The network; gradients are added to those of its parameters.
        batch (EpisodeBatch): The episodes.
        weights (Sequence[float]): w, the weight of each episode's task.
        losses (NamedLosses): L, and its parts by name.
        precision (Precision): Makes the context of the forward pass.
        losses_are_means (bool): Whether the losses are means over patches, not sums.
        adversary (Adversary | None): Adds a GAN's gradients, in which all patches have weight 1.
        step (int): Number of the step, counted from 1, for the adversary.

    Returns:
        OrderedDict[str, Tensor]: Mean losses by name, detached.
    """
    log: OrderedDict[str, Tensor] = OrderedDict()
    with precision():
        output = net(batch.lq.flatten(0, 1))
        if losses_are_means and all(weight == 1 for weight in weights):
            # One loss over all patches is the mean of the tasks' losses, and the step is bit-identical to SRModel's.
            total, values = losses(output, batch.gt.flatten(0, 1))
            log.update(values)
        else:
            total = torch.zeros((), device=output.device)
            for weight, out, gt in zip(weights, output.view_as(batch.gt), batch.gt, strict=True):
                loss, values = losses(out, gt)
                total = total + weight / len(weights) * loss
                for name, value in values.items():
                    log[name] = log.get(name, 0) + value.detach() / len(weights)
    log = OrderedDict((name, value.detach()) for name, value in log.items())
    if adversary is None:
        torch.autograd.backward(total)
    else:
        log.update(adversary.backward(total, output, batch.gt.flatten(0, 1), step))
    return log


def meta_step(
    net: nn.Module,
    batch: EpisodeBatch,
    weights: Sequence[float],
    criterion: Criterion,
    precision: Precision,
    rates: InnerRates,
    inner: InnerOptions,
    step: int,
) -> OrderedDict[str, Tensor]:
    """Accumulate ``g = (1/B) Σ w_i ∇_θ L_i^qry(θ_i')`` episode by episode.

    Args:
        net, batch, weights, precision: As for :func:`pretrain_step`.
        criterion (Criterion): L.
        rates (InnerRates): Step sizes of the inner loop; gradients are added to those of learned ones.
        inner (InnerOptions): ``drtl.inner``.
        step (int): Number of the training step, from which the numbers of inner steps are drawn.

    Returns:
        OrderedDict[str, Tensor]: ``l_query``, the mean query loss.
    """
    parameters = trainable_parameters(net)
    loss = functional_loss(net, criterion, precision)
    mean_query_loss = torch.zeros((), device=batch.lq.device)
    drawn = random.Random(step)  # not a tensor, since fetching its numbers could mean waiting for a GPU
    nums = [drawn.randint(inner.fewest_steps, inner.most_steps) for _ in weights]
    for episode, (weight, num) in enumerate(zip(weights, nums, strict=True)):
        support, query = batch.support_and_query(episode)
        batches = minibatches(support, num, inner.batch_size)
        outer = outer_gradient(loss, parameters, batches, query, rates.rates(), inner.algorithm, inner.checkpoint)
        accumulate(parameters, outer.parameters, weight / len(weights))
        rates.accumulate(outer.rates, weight / len(weights))
        mean_query_loss = mean_query_loss + outer.query_loss / len(weights)
        del outer  # gradients as large as the network, not needed while the next episode's are computed
    return OrderedDict(l_query=mean_query_loss)
