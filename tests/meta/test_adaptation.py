import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from drtl_plugin.meta.adaptation import adaptation, best_step, blend, last
from tests.meta.test_learner import batches, small_net


class Scalar(nn.Module):
    def __init__(self, value: float = 0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return self.theta * x


def output_alone(output, gt):
    """A loss of constant gradient 1, on inputs of 1."""
    return output


ONE = (torch.ones(()), torch.zeros(()))


def test_is_adam_on_the_batches():
    net = small_net()
    adapted = last(adaptation(net, nn.MSELoss(), batches(3), lr=1e-2))
    expected = copy.deepcopy(net).train()
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-2)
    for lq, gt in batches(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(expected(lq), gt).backward()
        optimizer.step()
    for a, b in zip(adapted.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not adapted.training


def test_the_rate_warms_up():
    # Under a constant gradient each of Adam's steps is as large as its rate.
    course = adaptation(Scalar(), output_alone, [ONE] * 6, lr=1e-2, warmup=4)
    path = [net.theta.item() for net in course]
    steps = [before - after for before, after in pairwise(path)]
    assert steps == pytest.approx([0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2, 1e-2], rel=1e-3)


def test_the_rate_falls_to_nothing():
    course = adaptation(Scalar(), output_alone, [ONE] * 5, lr=1e-2, warmup=2, decay_steps=5)
    path = [net.theta.item() for net in course]
    steps = [before - after for before, after in pairwise(path)]
    assert steps == pytest.approx([0.5e-2, 0.8e-2, 0.6e-2, 0.4e-2, 0.2e-2], rel=1e-3)


@pytest.mark.parametrize('rates', [None, {'theta': 0.1}])
def test_a_gradient_that_is_not_finite_is_skipped(rates):
    flat = (torch.tensor(float('nan')), torch.zeros(()))
    nets = [net.theta.item() for net in adaptation(Scalar(), output_alone, [ONE, flat, ONE], lr=0.1, rates=rates)]
    assert nets[1] == nets[2] != nets[3]
    assert nets == [
        *[net.theta.item() for net in adaptation(Scalar(), output_alone, [ONE], 0.1, rates=rates)],
        *nets[2:],
    ]


def test_a_blend_lies_between_a_network_and_the_average():
    net, first, second = (small_net() for _ in range(3))
    for other, change in ((first, 1.0), (second, 3.0)):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(change)
    for share, expected in ((0, 0), (0.5, 1), (1, 2)):
        between = blend(net, [first, second], share)
        assert not between.training
        for a, b in zip(between.parameters(), net.parameters(), strict=True):
            assert torch.equal(a, b) if share == 0 else torch.allclose(a, b + expected, rtol=1e-12)


def test_inner_rates_are_plain_gradient_descent_on_what_they_name():
    net = small_net().eval()
    rates = {'3.weight': 0.1, '3.bias': torch.tensor([0.3], dtype=torch.float64)}
    adapted = last(adaptation(net, nn.MSELoss(), batches(2), lr=5.0, rates=rates))
    expected = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD([{'params': [expected[3].weight]}, {'params': [expected[3].bias], 'lr': 0.3}], lr=0.1)
    for lq, gt in batches(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(expected(lq), gt).backward()
        optimizer.step()
    for a, b in zip(adapted.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    assert torch.equal(adapted[0].weight, net[0].weight)


def test_what_the_loss_does_not_see_stays():
    net = small_net()
    net.register_parameter('unused', nn.Parameter(torch.ones(2, dtype=torch.float64)))
    for rates in (None, {'unused': 0.1, '3.bias': 0.1}):
        adapted = last(adaptation(net, nn.MSELoss(), batches(2), lr=1e-2, rates=rates))
        assert adapted.unused.tolist() == [1, 1]


def test_leaves_the_network_alone():
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    last(adaptation(net, nn.MSELoss(), batches(2), lr=1e-2, ema_decay=0.9))
    assert list(before) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert all(p.requires_grad for p in net.parameters())


def test_no_batches_change_nothing():
    net = small_net()
    adapted = last(adaptation(net, nn.MSELoss(), [], lr=1e-2, ema_decay=0.9))
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), net.parameters(), strict=True))


def test_moving_average_is_ramped():
    # Adam's first steps on a constant gradient are of size lr: the weights are -lr, -2 lr.
    adapted = last(adaptation(Scalar(), output_alone, [ONE, ONE], lr=0.1, ema_decay=0.99))
    # decays 1/10 and 2/11
    first = 0.9 * -0.1
    assert adapted.theta.item() == pytest.approx(2 / 11 * first + 9 / 11 * -0.2, rel=1e-4)


def test_the_course_shows_each_step():
    course = [net.theta.item() for net in adaptation(Scalar(), output_alone, [ONE] * 3, lr=0.1)]
    assert course == pytest.approx([0, -0.1, -0.2, -0.3], rel=1e-4)


class TestBestStep:
    """θ goes down by 0.1 a step; held-out pairs want it at a value of their own."""

    def best(self, wanted: float, steps: int, taken: list | None = None) -> int:
        course = adaptation(Scalar(), output_alone, [ONE] * steps, lr=0.1)

        def held_out_loss(net):
            if taken is not None:
                taken.append(net.theta.item())
            return abs(net.theta.item() - wanted)

        return best_step(course, held_out_loss, steps)

    @pytest.mark.parametrize('wanted', [0, 1, 17, 30])
    def test_is_where_held_out_pairs_are_restored_best(self, wanted):
        assert self.best(-0.1 * wanted, steps=30) == wanted

    def test_is_found_to_within_a_fortieth(self):
        assert abs(self.best(-0.1 * 113, steps=200) - 113) <= 200 / 40

    def test_ends_long_after_the_best(self):
        taken = []
        self.best(-0.1 * 5, steps=1000, taken=taken)
        assert len(taken) < 15  # of 41 looks

    def test_no_steps_are_none(self):
        assert self.best(-1.0, steps=0) == 0
