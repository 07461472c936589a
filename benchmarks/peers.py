"""Outer gradients computed with two meta-learning libraries, as in their documentation.

`higher` monkey-patches modules, `torchopt` swaps parameters in place; both differentiate through their optimisers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import higher
import torch
import torchopt
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]
Precision = Callable[[], AbstractContextManager]


def loss_of(net: nn.Module, criterion: Criterion, pair: Pair, precision: Precision) -> Tensor:
    with precision():
        return criterion(net(pair[0]), pair[1])


def with_higher(
    net: nn.Module,
    criterion: Criterion,
    support: Pair,
    query: Pair,
    lr: float,
    steps: int,
    algorithm: str,
    precision: Precision = nullcontext,
) -> Sequence[Tensor]:
    """Gradients of ``maml`` or ``fomaml``, one per parameter of `net`."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    second_order = algorithm == 'maml'
    context = higher.innerloop_ctx(net, optimizer, copy_initial_weights=False, track_higher_grads=second_order)
    with context as (functional, descent):
        for _ in range(steps):
            descent.step(loss_of(functional, criterion, support, precision))
        loss = loss_of(functional, criterion, query, precision)
        return torch.autograd.grad(loss, list((net if second_order else functional).parameters()))


def with_torchopt(
    net: nn.Module,
    criterion: Criterion,
    support: Pair,
    query: Pair,
    lr: float,
    steps: int,
    algorithm: str,
    precision: Precision = nullcontext,
) -> Sequence[Tensor]:
    """Gradients of ``maml`` or ``fomaml``, one per parameter of `net`, which is not changed."""
    parameters = list(net.parameters())
    before = torchopt.extract_state_dict(net, by='reference')
    descent = torchopt.MetaSGD(net, lr=lr)
    for _ in range(steps):
        descent.step(loss_of(net, criterion, support, precision))
        if algorithm == 'fomaml':
            # First order in torchopt: cut the graph after each step.
            torchopt.stop_gradient(net)
            for p in net.parameters():
                p.requires_grad_(True)
    wanted = parameters if algorithm == 'maml' else list(net.parameters())
    gradients = torch.autograd.grad(loss_of(net, criterion, query, precision), wanted)
    torchopt.recover_state_dict(net, before)
    return gradients


PEERS = {'higher': with_higher, 'torchopt': with_torchopt}
