"""Learned step sizes of the inner loop, and which parameters have one."""

import pytest
import torch

from drtl_plugin.errors import OptionError
from tests.models.helpers import feed, parameters


class TestInnerRates:
    def test_meta_sgd_learns_a_rate_for_each_weight_and_resumes(self, build, quick_opt, workdir):
        quick_opt['drtl']['inner'].update(rate_lr=1e-3)
        quick_opt['drtl']['hooks'][0]['interval'] = 100
        model = build(quick_opt)
        for step in (1, 2):
            feed(model, [0, 1])
            model.optimize_parameters(step)
        rates = torch.cat([rate.detach().flatten() for rate in model.inner_rates.rates.values()])
        assert rates.shape == parameters(model.net_g).shape
        # Adam's first steps are of its learning rate.
        assert (rates - 1e-2).abs().max() == pytest.approx(2e-3, rel=0.05)
        model.save(epoch=0, current_iter=2)
        state = torch.load(workdir / 'experiments/drtl_x4/training_states/2.state', weights_only=True)
        resumed = build(quick_opt)
        resumed.resume_training(state)
        assert torch.equal(torch.cat([rate.flatten() for rate in resumed.inner_rates.rates.values()]), rates)
        assert len(resumed.optimizers[-1].state) == len(model.inner_rates.rates)

    def test_learned_rates_are_saved_and_taken_up(self, build, quick_opt, workdir):
        quick_opt['drtl']['inner'].update(rate_lr=1e-3)
        model = build(quick_opt)
        feed(model, [0, 1])
        model.optimize_parameters(1)
        model.save(epoch=0, current_iter=1)
        quick_opt['drtl']['inner'].update(rate_lr=0)
        quick_opt['path']['pretrain_inner_rates'] = str(workdir / 'experiments/drtl_x4/models/inner_rates_1.pth')
        fixed = build(quick_opt)
        assert not fixed.inner_rates.learned
        for name, rate in model.inner_rates.rates.items():
            assert torch.equal(fixed.inner_rates.rates[name], rate.detach())
        quick_opt['drtl']['inner'].update(parameters=['conv_last.*'])
        with pytest.raises(OptionError, match='belong to other parameters'):
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
        assert set(build(quick_opt).inner_rates.rates) == {'conv_last.weight', 'conv_last.bias'}

    def test_patterns_that_fit_nothing_are_named(self, build, quick_opt):
        quick_opt['drtl']['inner'].update(parameters=['head.*'])
        with pytest.raises(OptionError, match=r"drtl.inner.parameters: 'head.\*' fits none"):
            build(quick_opt)
