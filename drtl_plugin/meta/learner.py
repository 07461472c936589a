"""Inner loop, outer gradient and adaptation: pure functions over a network's parameters.

Equations (arXiv 2111.13078, meta-learning pipeline; Finn et al., arXiv 1703.03400, for MAML and its first order):

- inner loop ``θ_i' = θ - α ∇L_i^sup(θ)``, n times: :func:`inner_loop`
- outer gradient ``∇_θ L_i^qry(θ_i')``: :func:`outer_gradient`
- ``g = (1/B) Σ_i w_i g_i``: :func:`accumulate`
- few-shot adaptation, n steps on the target's support: :func:`adapt`

A network is called through ``torch.func.functional_call``, so that any registered architecture works as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

Parameters = Mapping[str, Tensor]
# Low-quality and ground-truth patches, (B, C, h, w) and (B, C, s h, s w).
Batch = tuple[Tensor, Tensor]
# Loss of the parameters on a batch; a scalar.
Loss = Callable[[Parameters, Batch], Tensor]
# Loss of an output against its ground truth; a scalar.
Criterion = Callable[[Tensor, Tensor], Tensor]


def functional_loss(net: nn.Module, criterion: Criterion) -> Loss:
    """The loss of a network as a function of its parameters.

    Args:
        net (nn.Module): Gives architecture and buffers. Buffers that the forward pass updates (running statistics)
            are updated in ``net``.
        criterion (Criterion): ``criterion(output, gt)``.

    Returns:
        Loss: ``loss(parameters, (lq, gt))``.
    """

    def loss(parameters: Parameters, batch: Batch) -> Tensor:
        lq, gt = batch
        return criterion(functional_call(net, dict(parameters), (lq,)), gt)

    return loss


def trainable_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training may change, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def inner_loop(
    loss: Loss, parameters: Parameters, support: Batch, lr: float, steps: int, first_order: bool
) -> dict[str, Tensor]:
    """``θ' = θ - α ∇L^sup(θ)``, n times.

    Args:
        loss (Loss): The task's loss.
        parameters (Parameters): θ; not changed.
        support (Batch): The task's support patches.
        lr (float): α.
        steps (int): n.
        first_order (bool): Cut θ' off from θ. Otherwise θ' is a differentiable function of θ.

    Returns:
        dict[str, Tensor]: θ'; leaves that require gradients if ``first_order``.
    """
    adapted = {name: p.detach().requires_grad_() if first_order else p for name, p in parameters.items()}
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(adapted, support), list(adapted.values()), create_graph=not first_order)
        adapted = {name: p - lr * g for (name, p), g in zip(adapted.items(), gradients)}
        if first_order:
            adapted = {name: p.detach().requires_grad_() for name, p in adapted.items()}
    return adapted


def outer_gradient(
    loss: Loss, parameters: Parameters, support: Batch, query: Batch, lr: float, steps: int, first_order: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """``∇_θ L^qry(θ')``: exact (MAML), or with the inner loop taken for the identity (FOMAML).

    Args:
        loss (Loss): The task's loss.
        parameters (Parameters): θ; leaves that require gradients.
        support, query (Batch): The task's patches for the inner and the outer loop.
        lr (float): α, step size of the inner loop.
        steps (int): Steps of the inner loop.
        first_order (bool): FOMAML instead of MAML.

    Returns:
        tuple[dict[str, Tensor], Tensor]: The gradient by parameter name, and the (detached) query loss.

    Example::

        loss = functional_loss(net, torch.nn.L1Loss())
        theta = trainable_parameters(net)
        gradient, _ = outer_gradient(loss, theta, support, query, lr=1e-2, steps=1, first_order=True)
        accumulate(theta, gradient, weight=1.0)
        optimizer.step()
    """
    adapted = inner_loop(loss, parameters, support, lr, steps, first_order)
    query_loss = loss(adapted, query)
    wanted = adapted if first_order else parameters
    gradients = torch.autograd.grad(query_loss, list(wanted.values()))
    return dict(zip(wanted, gradients)), query_loss.detach()


def accumulate(parameters: Parameters, gradients: Parameters, weight: float) -> None:
    """Add ``weight`` times ``gradients`` to the parameters' ``.grad``: a term of ``g = (1/B) Σ_i w_i g_i``."""
    for name, gradient in gradients.items():
        p = parameters[name]
        if p.grad is None:
            # In the parameter's memory layout, as autograd would make it.
            p.grad = torch.mul(gradient, weight, out=torch.empty_like(p))
        else:
            p.grad.add_(gradient, alpha=weight)


def adapt(
    net: nn.Module, criterion: Criterion, batches: Iterable[Batch], lr: float, ema_decay: float = 0.0
) -> nn.Module:
    """Few-shot adaptation: one Adam step for each batch of the target's support.

    Args:
        net (nn.Module): Trained network; not changed.
        criterion (Criterion): ``criterion(output, gt)``.
        batches (Iterable[Batch]): Support patches, one batch a step.
        lr (float): Learning rate of Adam.
        ema_decay (float): Decay of the moving average of the weights that is returned, ramped up from 0 as
            ``min(decay, (1 + t) / (10 + t))`` with the step t; 0 returns the last weights.

    Returns:
        nn.Module: The adapted copy, in evaluation mode.
    """
    student = copy.deepcopy(net).train()
    averaged = copy.deepcopy(student)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=lr)
    for step, (lq, gt) in enumerate(batches):
        optimizer.zero_grad()
        criterion(student(lq), gt).backward()
        optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, current in zip(averaged.parameters(), student.parameters()):
                average.lerp_(current, 1 - decay)
            for average, current in zip(averaged.buffers(), student.buffers()):
                average.copy_(current)
    return averaged.eval()
