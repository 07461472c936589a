"""Outer gradients against two meta-learning libraries, which go other ways to them (``benchmarks/peers.py``)."""

import copy

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from peers import PEERS
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
    return list(outer_gradient(loss, theta, [support] * steps, query, rates, algorithm).parameters.values())


@pytest.mark.parametrize('peer', PEERS.values(), ids=PEERS)
@pytest.mark.parametrize('steps', [1, 3])
@pytest.mark.parametrize('algorithm', ['maml', 'fomaml'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_outer_gradients_are_those_of_other_libraries(peer, steps, algorithm, dtype, tolerance):
    net, support, query = episode(dtype)
    expected = peer(copy.deepcopy(net), nn.MSELoss(), support, query, LR, steps, algorithm)
    result = ours(net, support, query, steps, algorithm)
    assert len(result) == len(expected)
    for gradient, other in zip(result, expected, strict=True):
        assert (gradient - other).norm() <= tolerance * other.norm()


def test_the_orders_differ():
    """What the peers confirm are two different gradients."""
    net, support, query = episode(torch.float64)
    exact, first = (ours(net, support, query, 3, algorithm) for algorithm in ('maml', 'fomaml'))
    assert max((a - b).norm() / a.norm() for a, b in zip(exact, first, strict=True)) > 1e-3
