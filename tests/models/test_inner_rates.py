"""Learned step sizes of the inner loop, and which parameters have one."""

import copy
import math

import pytest
import torch
from torch import nn

from drtl_plugin.errors import OptionError
from drtl_plugin.meta.learner import functional_loss, inner_loop, trainable_parameters
from tests.models.helpers import feed, skip_start


class TestInnerRates:
    def test_a_rate_is_learned_for_each_tensor_and_resumes(self, build, quick_opt, workdir):
        quick_opt['drtl']['inner'].update(rate_lr=0.1)
        quick_opt['drtl']['hooks'][0]['interval'] = 100
        model = build(quick_opt)
        for step in (1, 2):
            feed(model, [0, 1])
            model.optimize_parameters(step)
        rates = model.inner_rates.rates()
        assert set(rates) == {name for name, _ in model.net_g.named_parameters()}
        # Adam's first steps are of its learning rate, here in the logarithm.
        steps = [abs(math.log(rate.item() / 1e-2)) for rate in rates.values()]
        assert max(steps) == pytest.approx(0.2, rel=0.05)
        model.save(epoch=0, current_iter=2)
        state = torch.load(workdir / 'experiments/drtl_x4/training_states/2.state', weights_only=True)
        resumed = build(quick_opt)
        resumed.resume_training(state)
        assert resumed.inner_rates.state() == model.inner_rates.state()  # to the bit
        assert len(resumed.optimizers[-1].state) == len(rates)

    @pytest.mark.parametrize('algorithm', ['fomaml', 'maml'])
    def test_the_gradient_is_that_of_the_logarithm(self, build, quick_opt, algorithm):
        """Compared with autograd through exp and the whole inner loop, in double precision."""
        quick_opt['drtl']['inner'].update(rate_lr=0.1, algorithm=algorithm, steps=2, batch_size=1)
        quick_opt['datasets']['train'].update(num_support=2, num_query=2)
        quick_opt['drtl']['weighting'].update(relation='uniform')
        model = build(quick_opt)
        skip_start(model)
        feed(model, [0])
        net = copy.deepcopy(model.net_g)
        model.optimize_parameters(1)
        theta, loss = trainable_parameters(net), functional_loss(net, nn.L1Loss())
        logarithms = {name: torch.tensor(math.log(1e-2), requires_grad=True) for name in theta}
        (lq,), (gt,) = model.batch.lq, model.batch.gt
        rates = {name: value.exp() for name, value in logarithms.items()}
        halves = [(lq[i : i + 1], gt[i : i + 1]) for i in range(2)]
        adapted = inner_loop(loss, theta, halves, rates, first_order=algorithm == 'fomaml')
        loss(adapted, (lq[2:], gt[2:])).backward()
        expected = torch.stack([value.grad for value in logarithms.values()])
        found = torch.stack([model.inner_rates.logarithms[name].grad for name in theta])
        assert expected.abs().max() > 0
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())

    def test_learned_rates_are_saved_and_taken_up(self, build, quick_opt, workdir):
        quick_opt['drtl']['inner'].update(rate_lr=1e-3)
        model = build(quick_opt)
        feed(model, [0, 1])
        model.optimize_parameters(1)
        model.save(epoch=0, current_iter=1)
        path = workdir / 'experiments/drtl_x4/models/inner_rates_1.pth'
        quick_opt['drtl']['inner'].update(rate_lr=0)
        quick_opt['path']['pretrain_inner_rates'] = str(path)
        fixed = build(quick_opt)
        assert not fixed.inner_rates.logarithms
        assert {name: rate.item() for name, rate in fixed.inner_rates.rates().items()} == {
            name: rate.item() for name, rate in model.inner_rates.rates().items()
        }
        quick_opt['drtl']['inner'].update(parameters=['conv_last.*'])
        with pytest.raises(OptionError, match='belong to other parameters'):
            build(quick_opt)

    def test_rates_of_each_weight_are_refused(self, build, quick_opt, workdir):
        """Versions before 0.2 learned them."""
        net = build(quick_opt).net_g
        torch.save({'params': {name: torch.ones_like(p) for name, p in net.named_parameters()}}, workdir / 'old.pth')
        quick_opt['path']['pretrain_inner_rates'] = str(workdir / 'old.pth')
        with pytest.raises(OptionError, match='learn them again'):
            build(quick_opt)

    def test_states_with_and_without_rates_are_told_apart(self, build, quick_opt, workdir):
        model = build(quick_opt)
        feed(model, [0, 1])
        model.save(epoch=0, current_iter=1)
        state = torch.load(workdir / 'experiments/drtl_x4/training_states/1.state', weights_only=True)
        quick_opt['drtl']['inner'].update(rate_lr=1e-3)
        with pytest.raises(OptionError, match=r'drtl\.inner\.rate_lr'):
            build(quick_opt).resume_training(state)

    def test_patterns_limit_the_inner_loop(self, build, quick_opt):
        quick_opt['drtl']['inner'].update(parameters=['conv_last.*'])
        assert set(build(quick_opt).inner_rates.rates()) == {'conv_last.weight', 'conv_last.bias'}

    def test_patterns_that_fit_nothing_are_named(self, build, quick_opt):
        quick_opt['drtl']['inner'].update(parameters=['head.*'])
        with pytest.raises(OptionError, match=r"drtl.inner.parameters: 'head.\*' fits none"):
            build(quick_opt)
