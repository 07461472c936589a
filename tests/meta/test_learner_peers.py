"""Outer gradients against two meta-learning libraries, which go other ways to them.

`higher` monkey-patches modules, `torchopt` swaps parameters in place; both differentiate through their optimisers.
"""

import copy

import higher
import pytest
import torch
import torchopt
from basicsr.archs.edsr_arch import EDSR
from torch import nn

from drtl_plugin.meta.learner import functional_loss, outer_gradient, trainable_parameters

LR = 1e-2


def episode(dtype: torch.dtype):
    torch.manual_seed(0)
    net = EDSR(3, 3, num_feat=8, num_block=2, upscale=2, res_scale=1).to(dtype)
    # EDSR adds the mean colour of its own dtype.
    net.mean = net.mean.to(dtype)
    support, query = ((torch.rand(2, 3, 8, 8, dtype=dtype), torch.rand(2, 3, 16, 16, dtype=dtype)) for _ in range(2))
    return net, support, query


def ours(net, support, query, steps, algorithm):
    theta = trainable_parameters(net)
    rates = dict.fromkeys(theta, LR)
    # Not L1: its second derivative is zero, and would leave half of the second order untested.
    loss = functional_loss(net, nn.MSELoss())
    return list(outer_gradient(loss, theta, support, query, rates, steps, algorithm).parameters.values())


def with_higher(net, support, query, steps, algorithm):
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False, track_higher_grads=algorithm == 'maml') as (
        functional,
        descent,
    ):
        for _ in range(steps):
            descent.step(nn.functional.mse_loss(functional(support[0]), support[1]))
        loss = nn.functional.mse_loss(functional(query[0]), query[1])
        wanted = net.parameters() if algorithm == 'maml' else functional.parameters()
        return torch.autograd.grad(loss, list(wanted))


def with_torchopt(net, support, query, steps, algorithm):
    parameters = list(net.parameters())
    descent = torchopt.MetaSGD(net, lr=LR)
    if algorithm == 'fomaml':
        # Its idiom for the first order: cut the graph after each step.
        for _ in range(steps):
            descent.step(nn.functional.mse_loss(net(support[0]), support[1]))
            torchopt.stop_gradient(net)
            for p in net.parameters():
                p.requires_grad_(True)
        wanted = list(net.parameters())
    else:
        for _ in range(steps):
            descent.step(nn.functional.mse_loss(net(support[0]), support[1]))
        wanted = parameters
    return torch.autograd.grad(nn.functional.mse_loss(net(query[0]), query[1]), wanted)


@pytest.mark.parametrize('peer', [with_higher, with_torchopt])
@pytest.mark.parametrize('steps', [1, 3])
@pytest.mark.parametrize('algorithm', ['maml', 'fomaml'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_outer_gradients_are_those_of_other_libraries(peer, steps, algorithm, dtype, tolerance):
    net, support, query = episode(dtype)
    expected = peer(copy.deepcopy(net), support, query, steps, algorithm)
    result = ours(net, support, query, steps, algorithm)
    assert len(result) == len(expected)
    for gradient, other in zip(result, expected):
        assert (gradient - other).norm() <= tolerance * other.norm()


def test_the_orders_differ():
    """What the peers confirm are two different gradients."""
    net, support, query = episode(torch.float64)
    exact, first = (ours(net, support, query, 3, algorithm) for algorithm in ('maml', 'fomaml'))
    assert max((a - b).norm() / a.norm() for a, b in zip(exact, first)) > 1e-3
