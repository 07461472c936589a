import copy

import pytest
import torch
from torch import nn

from drtl_plugin.meta.learner import (
    accumulate,
    adapt,
    functional_loss,
    inner_loop,
    outer_gradient,
    trainable_parameters,
)

# Quadratic losses have closed forms: L^sup = a/2 (θ - c)², L^qry = b/2 (θ - d)².
A, C, B, D, ALPHA, THETA = 0.7, 2.0, 1.3, -1.0, 0.1, 0.5


def quadratic(parameters, batch):
    curvature, minimum = batch
    return curvature / 2 * (parameters['theta'] - minimum) ** 2


SUPPORT = (torch.tensor(A), torch.tensor(C))
QUERY = (torch.tensor(B), torch.tensor(D))


@pytest.fixture
def theta() -> dict[str, nn.Parameter]:
    return {'theta': nn.Parameter(torch.tensor(THETA, dtype=torch.float64))}


def after_steps(steps: int) -> float:
    return C + (1 - ALPHA * A) ** steps * (THETA - C)


@pytest.mark.parametrize('steps', [1, 3])
@pytest.mark.parametrize('first_order', [True, False])
def test_inner_loop_descends_the_support_loss(theta, steps, first_order):
    adapted = inner_loop(quadratic, theta, SUPPORT, ALPHA, steps, first_order)
    assert adapted['theta'].item() == pytest.approx(after_steps(steps), rel=1e-6)
    assert theta['theta'].item() == THETA


@pytest.mark.parametrize('steps', [1, 3])
def test_outer_gradients_have_their_closed_forms(theta, steps):
    first_order = B * (after_steps(steps) - D)
    for is_first_order, expected in ((True, first_order), (False, (1 - ALPHA * A) ** steps * first_order)):
        gradient, loss = outer_gradient(quadratic, theta, SUPPORT, QUERY, ALPHA, steps, is_first_order)
        assert gradient['theta'].item() == pytest.approx(expected, rel=1e-6)
        assert loss.item() == pytest.approx(B / 2 * (after_steps(steps) - D) ** 2, rel=1e-6)
        assert not loss.requires_grad


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 1, 3)).double()


def batches(num: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.rand(2, 1, 8, 8, generator=generator, dtype=torch.float64),
            torch.rand(2, 1, 4, 4, generator=generator, dtype=torch.float64),
        )
        for _ in range(num)
    ]


def test_exact_outer_gradient_agrees_with_finite_differences():
    net = small_net().eval()
    loss = functional_loss(net, nn.MSELoss())
    support, query = batches(2)
    parameters = trainable_parameters(net)
    gradient, _ = outer_gradient(loss, parameters, support, query, lr=0.3, steps=2, first_order=False)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}

    def outer_loss(step: float) -> float:
        moved = {name: (p + step * direction[name]).detach().requires_grad_() for name, p in parameters.items()}
        return loss(inner_loop(loss, moved, support, 0.3, 2, first_order=True), query).item()

    epsilon = 1e-5
    slope = (outer_loss(epsilon) - outer_loss(-epsilon)) / (2 * epsilon)
    assert sum((gradient[name] * direction[name]).sum() for name in gradient).item() == pytest.approx(slope, rel=1e-5)


def test_first_order_gradient_is_that_of_a_network_that_was_moved():
    net = small_net()
    net.eval()
    support, query = batches(2)
    gradient, _ = outer_gradient(
        functional_loss(net, nn.MSELoss()), trainable_parameters(net), support, query, 0.1, 2, first_order=True
    )
    moved = copy.deepcopy(net)
    optimizer = torch.optim.SGD(moved.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(moved(support[0]), support[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    nn.functional.mse_loss(moved(query[0]), query[1]).backward()
    for name, p in moved.named_parameters():
        assert torch.allclose(gradient[name], p.grad, rtol=1e-10)


def test_running_statistics_of_the_network_are_kept_up():
    net = small_net().train()
    before = net[1].running_mean.clone()
    functional_loss(net, nn.MSELoss())(trainable_parameters(net), batches(1)[0])
    assert not torch.equal(net[1].running_mean, before)


def test_frozen_parameters_are_left_out():
    net = small_net()
    net[0].weight.requires_grad_(False)
    assert '0.weight' not in trainable_parameters(net)


def test_accumulate_adds_weighted_terms(theta):
    for weight, gradient in ((0.5, 2.0), (1.5, 4.0)):
        accumulate(theta, {'theta': torch.tensor(gradient, dtype=torch.float64)}, weight)
    assert theta['theta'].grad.item() == pytest.approx(0.5 * 2 + 1.5 * 4)


class TestAdapt:
    def test_is_adam_on_the_batches(self):
        net = small_net()
        adapted = adapt(net, nn.MSELoss(), batches(3), lr=1e-2)
        expected = copy.deepcopy(net).train()
        optimizer = torch.optim.Adam(expected.parameters(), lr=1e-2)
        for lq, gt in batches(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(expected(lq), gt).backward()
            optimizer.step()
        for a, b in zip(adapted.state_dict().values(), expected.state_dict().values()):
            assert torch.equal(a, b)
        assert not adapted.training

    def test_leaves_the_network_alone(self):
        net = small_net()
        before = copy.deepcopy(net.state_dict())
        adapt(net, nn.MSELoss(), batches(2), lr=1e-2, ema_decay=0.9)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))

    def test_no_batches_change_nothing(self):
        net = small_net()
        adapted = adapt(net, nn.MSELoss(), [], lr=1e-2, ema_decay=0.9)
        assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), net.parameters()))

    def test_moving_average_is_ramped(self):
        class Scalar(nn.Module):
            def __init__(self):
                super().__init__()
                self.theta = nn.Parameter(torch.zeros(()))

            def forward(self, x):
                return self.theta * x

        # Adam's first steps on a constant gradient are of size lr: the weights are -lr, -2 lr.
        one = (torch.ones(()), torch.zeros(()))
        adapted = adapt(Scalar(), lambda output, gt: output, [one, one], lr=0.1, ema_decay=0.99)
        # decays 1/10 and 2/11
        first = 0.9 * -0.1
        assert adapted.theta.item() == pytest.approx(2 / 11 * first + 9 / 11 * -0.2, rel=1e-4)
