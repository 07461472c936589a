import copy

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from torch import nn

from drtl_plugin.errors import OptionError
from drtl_plugin.meta.learner import (
    accumulate,
    functional_loss,
    inner_loop,
    matching_names,
    minibatches,
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


RATES = {'theta': ALPHA}


@pytest.mark.parametrize('steps', [1, 3])
@pytest.mark.parametrize('first_order', [True, False])
def test_inner_loop_descends_the_support_loss(theta, steps, first_order):
    adapted = inner_loop(quadratic, theta, [SUPPORT] * steps, RATES, first_order)
    assert adapted['theta'].item() == pytest.approx(after_steps(steps), rel=1e-6)
    assert theta['theta'].item() == THETA


@pytest.mark.parametrize('steps', [1, 3])
def test_outer_gradients_have_their_closed_forms(theta, steps):
    first_order = B * (after_steps(steps) - D)
    for algorithm, expected in (('fomaml', first_order), ('maml', (1 - ALPHA * A) ** steps * first_order)):
        outer = outer_gradient(quadratic, theta, [SUPPORT] * steps, QUERY, RATES, algorithm)
        assert outer.parameters['theta'].item() == pytest.approx(expected, rel=1e-6)
        assert outer.query_loss.item() == pytest.approx(B / 2 * (after_steps(steps) - D) ** 2, rel=1e-6)
        assert not outer.query_loss.requires_grad
        assert outer.rates == {}


@pytest.mark.parametrize('steps', [1, 2, 3, 4])
def test_reptile_has_its_closed_form(theta, steps):
    """Gradient descent on support and query in turn; the gradient is the way gone, in units of the rate."""
    position = THETA
    for k in range(steps):
        curvature, minimum = (A, C) if k % 2 == 0 else (B, D)
        position -= ALPHA * curvature * (position - minimum)
    outer = outer_gradient(quadratic, theta, [SUPPORT] * steps, QUERY, RATES, 'reptile')
    assert outer.parameters['theta'].item() == pytest.approx((THETA - position) / ALPHA, rel=1e-6)
    assert outer.query_loss.item() == pytest.approx(B / 2 * (position - D) ** 2, rel=1e-6)


@pytest.mark.parametrize('steps', [1, 3])
@pytest.mark.parametrize('algorithm', ['maml', 'fomaml'])
def test_learned_rates_have_gradients_of_closed_form(theta, steps, algorithm):
    rate = torch.tensor(ALPHA, dtype=torch.float64, requires_grad=True)
    outer = outer_gradient(quadratic, theta, [SUPPORT] * steps, QUERY, {'theta': rate}, algorithm)
    slope = B * (after_steps(steps) - D)
    if algorithm == 'maml':  # d/dα of c + (1 - αa)^n (θ - c)
        expected = slope * -A * steps * (1 - ALPHA * A) ** (steps - 1) * (THETA - C)
    else:  # the gradients along the way are constants
        expected = -slope * sum(A * (after_steps(k) - C) for k in range(steps))
    assert outer.rates['theta'].item() == pytest.approx(expected, rel=1e-6)


def test_reptile_keeps_its_precision_at_small_rates():
    """In single precision, where θ - θ' would cancel out."""
    net = EDSR(3, 3, num_feat=8, num_block=1, upscale=2, res_scale=1)
    theta, loss = trainable_parameters(net), functional_loss(net, nn.L1Loss())
    lq, gt = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
    outer = outer_gradient(loss, theta, [(lq, gt)] * 2, (lq, gt), dict.fromkeys(theta, 1e-9), 'reptile')
    nn.functional.l1_loss(net(lq), gt).backward()
    for name, p in net.named_parameters():
        assert (outer.parameters[name] - 2 * p.grad).norm() <= 1e-5 * p.grad.norm()


class TestMinibatches:
    SUPPORT = torch.arange(5.0).view(5, 1), -torch.arange(5.0).view(5, 1)

    @pytest.mark.parametrize(
        ('size', 'expected'), [(2, [[0, 1], [2, 3], [4, 0]]), (5, [[0, 1, 2, 3, 4]] * 3), (None, [[0, 1, 2, 3, 4]] * 3)]
    )
    def test_take_the_patches_in_turn(self, size, expected):
        found = minibatches(self.SUPPORT, 3, size)
        assert [lq.flatten().tolist() for lq, _ in found] == expected
        assert all(torch.equal(gt, -lq) for lq, gt in found)

    def test_each_step_of_the_inner_loop_has_its_own(self, theta):
        """On L = (θ - c)², a step of 1/2 goes to the minimum of its own batch, whatever was before."""
        seen = []

        def loss(parameters, batch):
            seen.append(batch)
            return (parameters['theta'] - batch).square().sum() / 2

        ones = [torch.tensor(value, dtype=torch.float64) for value in (1.0, 2.0, 3.0)]
        outer = outer_gradient(loss, theta, ones[:2], ones[2], {'theta': 1.0}, 'fomaml')
        assert seen == ones
        assert outer.query_loss.item() == pytest.approx(0.5)  # from 2 to 3


def test_unknown_algorithms_are_refused(theta):
    with pytest.raises(ValueError, match='none of maml, fomaml, reptile'):
        outer_gradient(quadratic, theta, [SUPPORT], QUERY, RATES, 'mamll')


def test_what_has_no_rate_stays_in_the_inner_loop():
    """ANIL: here θ = (u, v), L = (u + v - minimum)² a/2, and u alone is adapted."""
    theta = {name: nn.Parameter(torch.tensor(THETA / 2, dtype=torch.float64)) for name in 'uv'}

    def loss(parameters, batch):
        return quadratic({'theta': parameters['u'] + parameters['v']}, batch)

    adapted = inner_loop(loss, theta, [SUPPORT], {'u': ALPHA}, first_order=True)
    assert adapted['v'] is theta['v']
    assert (adapted['u'] + adapted['v']).item() == pytest.approx(after_steps(1))
    outer = outer_gradient(loss, theta, [SUPPORT], QUERY, {'u': ALPHA}, 'maml')
    # both move the sum that the query sees by 1 - αa
    expected = (1 - ALPHA * A) * B * (after_steps(1) - D)
    assert [outer.parameters[name].item() for name in 'uv'] == pytest.approx([expected] * 2)


def test_patterns_choose_parameters_by_name():
    names = ['conv_first.weight', 'body.0.conv1.weight', 'body.1.conv1.bias', 'conv_last.weight', 'conv_last.bias']
    assert matching_names(names, ['*'], 'inner.parameters') == names
    assert matching_names(names, ['conv_last.*', 'body.1.*'], 'inner.parameters') == names[2:]
    with pytest.raises(OptionError, match=r"inner.parameters: 'head.\*' fits none .*; they are in body, conv_first"):
        matching_names(names, ['conv_last.*', 'head.*'], 'inner.parameters')
    with pytest.raises(OptionError, match='at least one pattern'):
        matching_names(names, [], 'inner.parameters')


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


def inner_and_outer(steps: int):
    """The same support patches for each inner step, and query patches."""
    support, query = batches(2)
    return [support] * steps, query


def test_exact_outer_gradient_agrees_with_finite_differences():
    net = small_net().eval()
    loss = functional_loss(net, nn.MSELoss())
    support, query = batches(2)
    parameters = trainable_parameters(net)
    rates = dict.fromkeys(parameters, 0.3)
    gradient = outer_gradient(loss, parameters, [support] * 2, query, rates, 'maml').parameters
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}

    def outer_loss(step: float) -> float:
        moved = {name: (p + step * direction[name]).detach().requires_grad_() for name, p in parameters.items()}
        return loss(inner_loop(loss, moved, [support] * 2, rates, first_order=True), query).item()

    epsilon = 1e-5
    slope = (outer_loss(epsilon) - outer_loss(-epsilon)) / (2 * epsilon)
    assert sum((gradient[name] * direction[name]).sum() for name in gradient).item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize('steps', [1, 3])
@pytest.mark.parametrize('adapted', ['*', '3.*'])
def test_checkpointed_steps_give_the_same_gradient(steps, adapted):
    """Of parameters, adapted in the inner loop or not, and of learned rates, which differ from weight to weight."""
    net = small_net().eval()
    loss = functional_loss(net, nn.MSELoss())
    theta = trainable_parameters(net)
    rates = {
        name: torch.rand_like(theta[name]).mul_(0.3).requires_grad_()
        for name in matching_names(theta, [adapted], 'inner.parameters')
    }
    plain, checkpointed = (
        outer_gradient(loss, theta, *inner_and_outer(steps), rates, 'maml', checkpoint) for checkpoint in (False, True)
    )
    assert checkpointed.query_loss == plain.query_loss
    for expected, found in ((plain.parameters, checkpointed.parameters), (plain.rates, checkpointed.rates)):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-14), name
            assert not found[name].requires_grad


def test_checkpointed_steps_draw_the_same_random_numbers():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Dropout(0.5), nn.Tanh(), nn.Conv2d(3, 1, 3)).double().train()
    loss, theta = functional_loss(net, nn.MSELoss()), trainable_parameters(net)
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(5)
        outer = outer_gradient(loss, theta, *inner_and_outer(2), dict.fromkeys(theta, 0.3), 'maml', checkpoint)
        found.append((outer.parameters, torch.rand(1)))
    for name, value in found[0][0].items():
        assert torch.allclose(found[1][0][name], value, rtol=1e-10, atol=1e-14), name
    assert found[0][1] == found[1][1]


def test_checkpointed_steps_keep_one_graph_at_a_time():
    """What is saved for backward at once, in bytes, does not grow with the number of steps."""
    net = small_net().eval()
    loss, theta = functional_loss(net, nn.MSELoss()), trainable_parameters(net)
    most = {}
    for checkpoint in (False, True):
        for steps in (1, 4):
            alive, peak = 0, 0

            class Saved:
                def __init__(self, tensor):
                    nonlocal alive, peak
                    self.tensor, self.size = tensor, tensor.numel()
                    alive += self.size
                    peak = max(peak, alive)

                def __del__(self):
                    nonlocal alive
                    alive -= self.size

            with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
                outer_gradient(loss, theta, *inner_and_outer(steps), dict.fromkeys(theta, 0.1), 'maml', checkpoint)
            most[checkpoint, steps] = peak
    assert most[True, 4] == most[True, 1]
    assert most[False, 4] > 2 * most[True, 4]


def test_first_order_gradient_is_that_of_a_network_that_was_moved():
    net = small_net()
    net.eval()
    support, query = batches(2)
    theta = trainable_parameters(net)
    loss = functional_loss(net, nn.MSELoss())
    gradient = outer_gradient(loss, theta, [support] * 2, query, dict.fromkeys(theta, 0.1), 'fomaml').parameters
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


def test_parameters_that_the_loss_does_not_see_have_zero_gradients():
    net = small_net()
    net.register_parameter('unused', nn.Parameter(torch.ones(2, dtype=torch.float64)))
    theta = trainable_parameters(net)
    loss = functional_loss(net, nn.MSELoss())
    for algorithm in ('maml', 'fomaml', 'reptile'):
        outer = outer_gradient(loss, theta, *inner_and_outer(1), dict.fromkeys(theta, 0.1), algorithm)
        assert outer.parameters['unused'].tolist() == [0, 0]


def test_frozen_parameters_are_left_out():
    net = small_net()
    net[0].weight.requires_grad_(False)
    assert '0.weight' not in trainable_parameters(net)


def test_accumulate_adds_weighted_terms(theta):
    for weight, gradient in ((0.5, 2.0), (1.5, 4.0)):
        accumulate(theta, {'theta': torch.tensor(gradient, dtype=torch.float64)}, weight)
    assert theta['theta'].grad.item() == pytest.approx(0.5 * 2 + 1.5 * 4)


def test_all_parameters_at_once_are_what_each_alone_is():
    """One number for all rates is taken another way than rates of their own."""
    net = small_net()
    parameters = dict(net.named_parameters())
    loss = functional_loss(net, nn.MSELoss())
    results = []
    for rates in (dict.fromkeys(parameters, 0.1), {name: torch.full_like(p, 0.1) for name, p in parameters.items()}):
        outer = outer_gradient(loss, parameters, *inner_and_outer(2), rates, 'maml')
        for p in parameters.values():
            p.grad = None
        for weight in (0.5, 1.5):
            accumulate(parameters, outer.parameters, weight)
        results.append({name: p.grad for name, p in parameters.items()})
        for name, p in parameters.items():
            torch.testing.assert_close(p.grad, 2 * outer.parameters[name])
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name])
