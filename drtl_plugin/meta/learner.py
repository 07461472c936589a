"""Inner loop and outer gradient: pure functions over a network's parameters.

The paper (arXiv 2111.13078) names a meta-learning pipeline with relation-weighted gradients. The formulas are our
reconstruction, based on the algorithms that they cite:

- inner loop ``θ_i' = θ - α ∘ ∇L_i^sup(θ)``, n times: :func:`inner_loop`
- outer gradient of MAML and FOMAML (Finn et al., arXiv 1703.03400, sections 2.2 and 5.2) and Reptile (Nichol et al.,
  arXiv 1803.02999, section 3): :func:`outer_gradient`
- ``g = (1/B) Σ_i w_i g_i``: :func:`accumulate`

The step sizes α are a mapping from parameter names. The inner loop does not change parameters that are not in it (ANIL,
Raghu et al., arXiv 1909.09157), and step sizes may be learned tensors (Meta-SGD, Li et al., arXiv 1707.09835).

A network is called through ``torch.func.functional_call``, so that any registered architecture works unchanged.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import get_device_states, set_device_states

from drtl_plugin.errors import OptionError

Parameters = Mapping[str, Tensor]
# α by parameter name: a number, or a tensor of the parameter's shape.
Rates = Mapping[str, 'float | Tensor']
# LQ and GT patches, (B, C, h, w) and (B, C, s h, s w).
Batch = tuple[Tensor, Tensor]
# Loss of the parameters on a batch; a scalar.
Loss = Callable[[Parameters, Batch], Tensor]
# Loss between an output and its GT; a scalar.
Criterion = Callable[[Tensor, Tensor], Tensor]
# Makes the context in which networks are computed: autocast, or nothing.
Precision = Callable[[], AbstractContextManager[Any]]

ALGORITHMS = ('maml', 'fomaml', 'reptile')


def functional_loss(net: nn.Module, criterion: Criterion, precision: Precision = nullcontext) -> Loss:
    """The loss of a network as a function of its parameters.

    Args:
        net (nn.Module): Gives architecture and buffers. Buffers that the forward pass updates (running statistics)
            are updated in ``net``.
        criterion (Criterion): ``criterion(output, gt)``.
        precision (Precision): Makes the context in which the network and the criterion are computed, e.g.
            autocast. Compute gradients of the loss outside of it.

    Returns:
        Loss: ``loss(parameters, (lq, gt))``.
    """

    def loss(parameters: Parameters, batch: Batch) -> Tensor:
        lq, gt = batch
        with precision():
            return criterion(functional_call(net, dict(parameters), (lq,)), gt)

    return loss


def trainable_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training may change, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def matching_names(names: Iterable[str], patterns: Sequence[str], where: str) -> list[str]:
    """The names that match one of the patterns.

    Args:
        names (Iterable[str]): Parameter names.
        patterns (Sequence[str]): With ``*``, ``?`` and ``[…]`` as in file names, e.g. ``conv_last.*``.
        where (str): Key in the option file, for messages.

    Raises:
        OptionError: If there is no pattern, or one matches no name.
    """
    names = list(names)
    if not patterns:
        raise OptionError(f"{where}: expected at least one pattern, e.g. '*' for all parameters.")
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            groups = ', '.join(sorted({name.split('.')[0] for name in names}))
            raise OptionError(f"{where}: {pattern!r} fits none of the network's parameters; they are in {groups}.")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def gradients_of(loss: Tensor, tensors: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """``torch.autograd.grad``, with zeros for parameters that the loss does not depend on."""
    return torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def minibatches(support: Batch, steps: int, size: int | None) -> list[Batch]:
    """The patches of each inner step.

    Args:
        support (Batch): The task's support patches, ``(S, …)``.
        steps (int): n, steps of the inner loop.
        size (int | None): Patches of a step, taken in turn; None: all of them in each step.
    """
    if size is None:
        return [support] * steps
    lq, gt = support
    chosen = [[(step * size + i) % len(lq) for i in range(size)] for step in range(steps)]
    return [(lq[rows], gt[rows]) for rows in chosen]


def inner_step(
    loss: Loss, parameters: Parameters, batch: Batch, rates: Rates, first_order: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``θ' = θ - α ∘ ∇L(θ)``.

    Args:
        loss (Loss): The task's loss.
        parameters (Parameters): θ; not changed.
        batch (Batch): The task's patches.
        rates (Rates): α, for the parameters that are adapted.
        first_order (bool): Treat the gradient as a constant. Otherwise θ' is a differentiable function of θ through
            the gradient, too.

    Returns:
        tuple[dict[str, Tensor], dict[str, Tensor]]: θ', including the parameters that are not adapted, and the gradient
        by the names of those that are.
    """
    moving = {name: parameters[name] for name in rates}
    if first_order:
        # The graph of the gradient ends here; θ' keeps its identity path to θ, and α keeps its path.
        moving = {name: p.detach().requires_grad_() for name, p in moving.items()}
    value = loss({**parameters, **moving}, batch)
    gradients = dict(zip(moving, gradients_of(value, list(moving.values()), create_graph=not first_order), strict=True))
    return {**parameters, **_descended(parameters, gradients, rates)}, gradients


def _descended(parameters: Parameters, gradients: Parameters, rates: Rates) -> dict[str, Tensor]:
    """``θ - α ∘ g`` of the adapted parameters; if α is one number, all at once, which is faster on a GPU."""
    numbers = {rate for rate in rates.values() if not isinstance(rate, Tensor)}
    if len(numbers) == 1 and not any(isinstance(rate, Tensor) for rate in rates.values()):
        theta, g = ([tensors[name] for name in rates] for tensors in (parameters, gradients))
        return dict(zip(rates, torch._foreach_sub(theta, torch._foreach_mul(g, numbers.pop())), strict=True))
    return {name: parameters[name] - rate * gradients[name] for name, rate in rates.items()}


def inner_loop(
    loss: Loss, parameters: Parameters, batches: Iterable[Batch], rates: Rates, first_order: bool
) -> dict[str, Tensor]:
    """:func:`inner_step`, once for each batch: θ after the inner loop."""
    adapted = dict(parameters)
    for batch in batches:
        adapted, _ = inner_step(loss, adapted, batch, rates, first_order)
    return adapted


@dataclass(frozen=True, eq=False)
class OuterGradient:
    """The outer gradient of an episode.

    Attributes:
        parameters (dict[str, Tensor]): Gradient by parameter name.
        rates (dict[str, Tensor]): Gradient by name, for the rates that are learned (tensors that require a gradient).
        query_loss (Tensor): Loss of θ' on the query patches, detached.
    """

    parameters: dict[str, Tensor]
    rates: dict[str, Tensor]
    query_loss: Tensor


def outer_gradient(
    loss: Loss,
    parameters: Parameters,
    batches: Sequence[Batch],
    query: Batch,
    rates: Rates,
    algorithm: str,
    checkpoint: bool = False,
) -> OuterGradient:
    """The outer gradient of an episode for θ (and learned α), for an optimiser that descends.

    - ``maml``: ``∇_θ L^qry(θ')``, exact, through the inner loop's gradients (second order);
    - ``fomaml``: the same with these gradients treated as constants, i.e. ``∇L^qry`` at θ'. Learned α get
      ``-∇L^qry(θ') ∘ Σ_k ∇L^sup(θ_k)``;
    - ``reptile``: ``(θ - θ') / α``, the sum of the inner loop's gradients, every other step of which uses the query
      patches; only for the parameters that are adapted. Rates are not learned.

    Args:
        loss (Loss): The task's loss.
        parameters (Parameters): θ; leaves that require gradients.
        batches (Sequence[Batch]): The task's patches for each of the n steps of the inner loop.
        query (Batch): Those for the outer loop.
        rates (Rates): α, step sizes of the inner loop, for the parameters that are adapted.
        algorithm (str): One of ``ALGORITHMS``.
        checkpoint (bool): For ``maml`` only: see :func:`_checkpointed`. The others keep no graph of an inner step.

    Raises:
        ValueError: For another algorithm.

    Example::

        loss = functional_loss(net, torch.nn.L1Loss())
        theta = trainable_parameters(net)
        rates = dict.fromkeys(theta, 1e-2)
        outer = outer_gradient(loss, theta, [support], query, rates, algorithm='fomaml')
        accumulate(theta, outer.parameters, weight=1.0)
        optimizer.step()
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f'{algorithm!r} is none of {", ".join(ALGORITHMS)}.')
    if algorithm == 'reptile':
        adapted, total = dict(parameters), {name: torch.zeros_like(parameters[name]) for name in rates}
        for step, batch in enumerate(batches):
            batch = query if step % 2 else batch
            adapted, gradients = inner_step(loss, adapted, batch, rates, first_order=True)
            # Not the difference of θ and θ', in which small rates would suffer from cancellation.
            total = {name: total[name] + gradients[name] for name in rates}
        with torch.no_grad():
            return OuterGradient(total, {}, loss(adapted, query))
    learned = {name: rate for name, rate in rates.items() if isinstance(rate, Tensor) and rate.requires_grad}
    if algorithm == 'maml' and checkpoint:
        return _checkpointed(loss, parameters, batches, query, rates, learned)
    adapted = inner_loop(loss, parameters, batches, rates, first_order=algorithm == 'fomaml')
    query_loss = loss(adapted, query)
    outer = gradients_of(query_loss, [*parameters.values(), *learned.values()])
    return OuterGradient(
        dict(zip(parameters, outer[: len(parameters)], strict=True)),
        dict(zip(learned, outer[len(parameters) :], strict=True)),
        query_loss.detach(),
    )


def _checkpointed(
    loss: Loss,
    parameters: Parameters,
    batches: Sequence[Batch],
    query: Batch,
    rates: Rates,
    learned: Mapping[str, Tensor],
) -> OuterGradient:
    """The exact outer gradient in the memory of one inner step, however many there are; each is computed twice.

    A first pass runs the inner loop without a graph and stores its path ``θ_0, …, θ_n``. A second pass goes backwards:
    the vector-Jacobian product of each step turns the gradient at ``θ_{k+1}`` into that at ``θ_k``. For this, the step
    is recomputed with its graph, and with the same random numbers (dropout) as before. Running statistics are updated
    twice.
    """
    way = [{name: p.detach().requires_grad_() for name, p in parameters.items()}]
    with torch.no_grad():
        fixed = {name: rate.detach() if isinstance(rate, Tensor) else rate for name, rate in rates.items()}
    states = []
    for batch in batches:
        states.append((torch.get_rng_state(), *get_device_states(*batch)))
        after, _ = inner_step(loss, way[-1], batch, fixed, first_order=True)
        way.append({name: p.detach().requires_grad_() for name, p in after.items()})
    query_loss = loss(way[-1], query)
    gradient = gradients_of(query_loss, list(way.pop().values()))
    query_loss = query_loss.detach()
    rate_gradients = {name: torch.zeros_like(rate) for name, rate in learned.items()}
    while way:
        theta = way.pop()
        cpu_state, devices, device_states = states.pop()
        with torch.random.fork_rng(devices):
            torch.set_rng_state(cpu_state)
            set_device_states(devices, device_states)
            after, _ = inner_step(loss, theta, batches[len(way)], rates, first_order=False)
        found = torch.autograd.grad(
            list(after.values()),
            [*theta.values(), *learned.values()],
            gradient,
            allow_unused=True,
            materialize_grads=True,
        )
        gradient = found[: len(theta)]
        rate_gradients = {name: rate_gradients[name] + found[len(theta) + i] for i, name in enumerate(learned)}
    return OuterGradient(dict(zip(parameters, gradient, strict=True)), rate_gradients, query_loss)


def accumulate(parameters: Parameters, gradients: Parameters, weight: float) -> None:
    """Add ``weight`` times ``gradients`` to the parameters' ``.grad``: a term of ``g = (1/B) Σ_i w_i g_i``."""
    sums, terms = [], []
    for name, gradient in gradients.items():
        p = parameters[name]
        if p.grad is None:
            # In the parameter's memory layout, as autograd would make it.
            p.grad = torch.mul(gradient, weight, out=torch.empty_like(p))
        else:
            sums.append(p.grad)
            terms.append(gradient)
    if sums:
        torch._foreach_add_(sums, terms, alpha=weight)
