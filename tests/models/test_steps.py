"""The gradient of each pipeline against the sum that it is defined as."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from drtl_plugin.errors import OptionError
from drtl_plugin.meta.learner import functional_loss, outer_gradient, trainable_parameters
from drtl_plugin.models import steps as steps_module
from tests.models.helpers import batch_of, feed, skip_start


class TestWeightedGradients:
    """The gradient of each pipeline against the sum that it is defined as."""

    WEIGHTS = torch.tensor([0.4, 1.6, 2.0, 0.0])

    def prepared(self, build, quick_opt, pipeline, mode='gradient'):
        quick_opt['drtl'].update(pipeline=pipeline, hooks=[])
        quick_opt['drtl']['weighting'].update(relation='uniform', mode=mode)
        quick_opt['train']['ema_decay'] = 0
        model = build(quick_opt)
        skip_start(model)
        model.weights = self.WEIGHTS
        return model

    def test_meta(self, build, quick_opt):
        model = self.prepared(build, quick_opt, 'meta')
        feed(model, [1, 0])
        net = copy.deepcopy(model.net_g)
        model.optimize_parameters(1)
        loss = functional_loss(net, nn.L1Loss())
        expected = 0
        for weight, lq, gt in zip((1.6, 0.4), model.batch.lq, model.batch.gt, strict=True):
            theta = trainable_parameters(net)
            outer = outer_gradient(
                loss, theta, [(lq[:1], gt[:1])], (lq[1:], gt[1:]), dict.fromkeys(theta, 1e-2), 'fomaml'
            )
            expected = expected + weight / 2 * torch.cat([g.flatten() for g in outer.parameters.values()])
        result = torch.cat([p.grad.flatten() for p in model.net_g.parameters()])
        assert torch.allclose(result, expected, rtol=1e-4, atol=1e-7)

    def test_pretrain(self, build, quick_opt):
        model = self.prepared(build, quick_opt, 'pretrain')
        feed(model, [2, 0])
        net = copy.deepcopy(model.net_g)
        model.optimize_parameters(1)
        losses = [nn.functional.l1_loss(net(lq), gt) for lq, gt in zip(model.batch.lq, model.batch.gt, strict=True)]
        ((2.0 * losses[0] + 0.4 * losses[1]) / 2).backward()
        for p, q in zip(model.net_g.parameters(), net.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7)
        assert model.get_current_log()['l_pix'] == pytest.approx(sum(losses).item() / 2, rel=1e-4)

    @pytest.mark.parametrize('weights', [[1.0, 1.0], [1.0, 1.0 + 1e-6]])
    def test_losses_that_add_up_are_averaged_over_tasks(self, build, quick_opt, weights):
        quick_opt['train']['pixel_opt']['reduction'] = 'sum'
        model = self.prepared(build, quick_opt, 'pretrain')
        model.weights = torch.tensor([*weights, 1.0, 1.0])
        feed(model, [0, 1])
        net = copy.deepcopy(model.net_g)
        model.optimize_parameters(1)
        sum((net(lq) - gt).abs().sum() / 2 for lq, gt in zip(model.batch.lq, model.batch.gt, strict=True)).backward()
        for p, q in zip(model.net_g.parameters(), net.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-2)

    def test_sampling_draws_tasks_by_weight_and_weights_none(self, build, quick_opt):
        model = self.prepared(build, quick_opt, 'pretrain', mode='sampling')
        drawn = torch.zeros(4)
        for model.num_update in range(100):
            model.feed_data(batch_of(model, 2))
            drawn += torch.bincount(torch.tensor(model.batch.tasks), minlength=4)
        assert drawn[3] == 0
        assert (drawn / 200).tolist() == pytest.approx((self.WEIGHTS / 4).tolist(), abs=0.12)
        net = copy.deepcopy(model.net_g)
        model.optimize_parameters(1)
        nn.functional.l1_loss(net(model.batch.lq.flatten(0, 1)), model.batch.gt.flatten(0, 1)).backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.net_g.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize('pipeline', ['pretrain', 'meta'])
@pytest.mark.parametrize('mode', ['gradient', 'sampling'])
def test_modes_agree_in_expectation(build, quick_opt, pipeline, mode):
    """The mean gradient of many draws, at a fixed θ, is the sum of the tasks' gradients with ``w_i / N``."""
    quick_opt['datasets']['train']['distortions'] = [
        {'name': 'bicubic'},
        {'name': 'gaussian_blur', 'sigma': 3},
        {'name': 'sharpen', 'weight': 5},
        {'name': 'jpeg', 'quality': 10},
    ]  # nothing is drawn within a task
    quick_opt['train']['optim_g']['lr'] = 0.0  # θ stays
    quick_opt['drtl'].update(pipeline=pipeline, hooks=[])
    quick_opt['drtl']['weighting'].update(relation='uniform', mode=mode)
    model = build(quick_opt)
    skip_start(model)
    batch = batch_of(model, 4)
    for key in ('support_gt', 'query_gt'):
        batch[key] = batch[key][:1].repeat(4, 1, 1, 1, 1)  # tasks differ, contents don't

    def mean_gradient(weights: list[float], steps: int) -> torch.Tensor:
        model.weights, total = torch.tensor(weights), 0
        for step in range(1, steps + 1):
            model.feed_data(batch)
            model.optimize_parameters(step)
            total = total + torch.cat([p.grad.flatten() for p in model.net_g.parameters()]).double() / steps
        return total

    of_tasks = []
    for i in range(4):
        with mock.patch.object(model.episodes, 'draw_task', lambda *_, i=i: i):
            of_tasks.append(mean_gradient([4.0 * (j == i) for j in range(4)], 1))
    of_tasks = torch.stack(of_tasks, dim=1) / (4 if mode == 'gradient' else 1)
    weights = [0.1, 2.4, 1.3, 0.2]
    mean = mean_gradient(weights, 100)
    parts = torch.linalg.lstsq(of_tasks, mean[:, None]).solution.flatten()
    # Frequencies of 400 draws have a standard error of up to 0.025; weighted by 2.4, up to 0.05.
    assert parts.tolist() == pytest.approx([w / 4 for w in weights], abs=0.12)


def test_checkpointing_takes_the_same_step(build, quick_opt):
    quick_opt['drtl'].update(pipeline='meta', hooks=[])
    quick_opt['drtl']['weighting'].update(relation='uniform')
    steps = []
    for checkpoint in (False, True):
        quick_opt['drtl']['inner'] = {'algorithm': 'maml', 'steps': 2, 'checkpoint': checkpoint}
        model = build(quick_opt)
        feed(model, [0, 1])
        model.optimize_parameters(1)
        steps.append(torch.cat([p.grad.flatten() for p in model.net_g.parameters()]))
    assert torch.allclose(*steps, rtol=1e-4, atol=1e-7)


class TestNumberOfInnerSteps:
    def numbers(self, build, quick_opt, steps, monkeypatch):
        """Those of four training steps of two episodes."""
        quick_opt['drtl'].update(pipeline='meta', hooks=[], inner={'steps': steps, 'batch_size': 1})
        quick_opt['drtl']['weighting'].update(relation='uniform')
        model = build(quick_opt)
        skip_start(model)
        found = []

        def counted(loss, parameters, batches, *others):
            found.append(len(batches))
            return outer_gradient(loss, parameters, batches, *others)

        monkeypatch.setattr(steps_module, 'outer_gradient', counted)
        for step in range(1, 5):
            feed(model, [0, 1])
            model.optimize_parameters(step)
        return found

    def test_is_drawn_for_each_episode(self, build, quick_opt, monkeypatch):
        found = self.numbers(build, quick_opt, [1, 3], monkeypatch)
        assert set(found) == {1, 2, 3}
        assert self.numbers(build, quick_opt, [1, 3], monkeypatch) == found

    @pytest.mark.parametrize('steps', [2, [2, 2]])
    def test_may_be_fixed(self, build, quick_opt, monkeypatch, steps):
        assert self.numbers(build, quick_opt, steps, monkeypatch) == [2] * 8

    @pytest.mark.parametrize('steps', [[3, 1], [1], [1, 2, 3], [0, 1], 'many'])
    def test_that_is_no_range_is_refused(self, build, quick_opt, steps):
        quick_opt['drtl']['inner'] = {'steps': steps}
        with pytest.raises(OptionError, match=r'drtl\.inner\.steps'):
            build(quick_opt)
