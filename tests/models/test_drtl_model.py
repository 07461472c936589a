import copy
import dataclasses
from collections import OrderedDict
from typing import ClassVar
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from basicsr.models import build_model
from basicsr.utils import get_root_logger
from basicsr.utils.misc import check_resume
from torch import nn
from torch._dynamo import lookup_backend
from torch.utils.data import default_collate

from drtl_plugin import cli
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.meta.learner import functional_loss, outer_gradient, trainable_parameters
from drtl_plugin.models import drtl_model
from drtl_plugin.models.drtl_model import DRTLModel
from drtl_plugin.options.parse import load_option_file, parse_options
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY, RelationQuestion
from drtl_plugin.relation.graph import KnowledgeGraph
from tests.fetches import watch_fetches
from tests.options.test_parse import arguments


@pytest.fixture
def build(workdir, write_opt):
    """Build a model from options as the command line does, with its folders there."""

    def build_from(opt: dict):
        parsed = parse_options(arguments(write_opt(opt)), str(workdir), is_train=True)
        parsed['root_path'] = str(workdir)
        for key in ('models', 'training_states', 'visualization'):
            (workdir / parsed['path'][key]).mkdir(parents=True, exist_ok=True)
        return build_model(parsed)

    return build_from


def episodes(model: DRTLModel, tasks: list[int]) -> dict:
    batch = default_collate([model.task_data[i] for i in range(len(tasks))])
    return {**batch, 'task': torch.tensor(tasks)}


class AutocastRecord(torch.autograd.Function):
    """The identity, which records whether autocast is on in forward and backward passes."""

    forwards: ClassVar[list[bool]] = []
    backwards: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, x):
        AutocastRecord.forwards.append(torch.is_autocast_enabled('cpu'))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        AutocastRecord.backwards.append(torch.is_autocast_enabled('cpu'))
        return gradient


def parameters(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


class TestWeightedGradients:
    """The gradient of each pipeline against the sum that it is defined as."""

    WEIGHTS = torch.tensor([0.4, 1.6, 2.0, 0.0])

    def prepared(self, build, quick_opt, pipeline, mode='gradient'):
        quick_opt['drtl'].update(pipeline=pipeline, hooks=[])
        quick_opt['drtl']['weighting'].update(relation='uniform', mode=mode)
        quick_opt['train']['ema_decay'] = 0
        model = build(quick_opt)
        model._started = True  # no relation is measured: the weights are set here
        model.weights = self.WEIGHTS
        return model

    def test_meta(self, build, quick_opt):
        model = self.prepared(build, quick_opt, 'meta')
        model.feed_data(episodes(model, [1, 0]))
        net = copy.deepcopy(model.net_g)
        model.optimize_parameters(1)
        loss = functional_loss(net, nn.L1Loss())
        expected = 0
        for weight, lq, gt in zip((1.6, 0.4), model.episode_lq, model.episode_gt):
            theta = trainable_parameters(net)
            outer = outer_gradient(
                loss, theta, (lq[:1], gt[:1]), (lq[1:], gt[1:]), dict.fromkeys(theta, 1e-2), 1, 'fomaml'
            )
            expected = expected + weight / 2 * torch.cat([g.flatten() for g in outer.parameters.values()])
        result = torch.cat([p.grad.flatten() for p in model.net_g.parameters()])
        assert torch.allclose(result, expected, rtol=1e-4, atol=1e-7)

    def test_pretrain(self, build, quick_opt):
        model = self.prepared(build, quick_opt, 'pretrain')
        model.feed_data(episodes(model, [2, 0]))
        net = copy.deepcopy(model.net_g)
        model.optimize_parameters(1)
        losses = [nn.functional.l1_loss(net(lq), gt) for lq, gt in zip(model.episode_lq, model.episode_gt)]
        ((2.0 * losses[0] + 0.4 * losses[1]) / 2).backward()
        for p, q in zip(model.net_g.parameters(), net.parameters()):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7)
        assert model.get_current_log()['l_pix'] == pytest.approx(sum(losses).item() / 2, rel=1e-4)

    @pytest.mark.parametrize('weights', [[1.0, 1.0], [1.0, 1.0 + 1e-6]])
    def test_losses_that_add_up_are_averaged_over_tasks(self, build, quick_opt, weights):
        quick_opt['train']['pixel_opt']['reduction'] = 'sum'
        model = self.prepared(build, quick_opt, 'pretrain')
        model.weights = torch.tensor([*weights, 1.0, 1.0])
        model.feed_data(episodes(model, [0, 1]))
        net = copy.deepcopy(model.net_g)
        model.optimize_parameters(1)
        sum((net(lq) - gt).abs().sum() / 2 for lq, gt in zip(model.episode_lq, model.episode_gt)).backward()
        for p, q in zip(model.net_g.parameters(), net.parameters()):
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-2)

    def test_target_term(self, build, quick_opt):
        quick_opt['drtl']['target_weight'] = 0.5
        model = self.prepared(build, quick_opt, 'meta')
        model.feed_data(episodes(model, [3, 3]))  # of weight 0
        net = copy.deepcopy(model.net_g)
        model.optimize_parameters(1)
        lq, gt = model.target_batch
        (0.5 * nn.functional.l1_loss(net(lq), gt)).backward()
        for p, q in zip(model.net_g.parameters(), net.parameters()):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7)

    def test_sampling_draws_tasks_by_weight_and_weights_none(self, build, quick_opt):
        model = self.prepared(build, quick_opt, 'pretrain', mode='sampling')
        drawn = torch.zeros(4)
        for model.num_update in range(100):
            model.feed_data(episodes(model, [0, 0]))
            drawn += torch.bincount(torch.tensor(model.episode_tasks), minlength=4)
        assert drawn[3] == 0
        assert (drawn / 200).tolist() == pytest.approx((self.WEIGHTS / 4).tolist(), abs=0.12)
        net = copy.deepcopy(model.net_g)
        model.optimize_parameters(1)
        nn.functional.l1_loss(net(model.episode_lq.flatten(0, 1)), model.episode_gt.flatten(0, 1)).backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.net_g.parameters(), net.parameters()))


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
    model._started = True
    generator = torch.Generator().manual_seed(1)
    batch = episodes(model, [0] * 4)
    for key in ('support_gt', 'query_gt'):
        batch[key] = batch[key][:1].repeat(4, 1, 1, 1, 1)  # tasks differ, contents don't

    def mean_gradient(weights: list[float], draw_tasks, steps: int) -> torch.Tensor:
        model.weights, total = torch.tensor(weights), 0
        for step in range(1, steps + 1):
            batch['task'] = draw_tasks()
            model.feed_data(batch)
            model.optimize_parameters(step)
            total = total + torch.cat([p.grad.flatten() for p in model.net_g.parameters()]).double() / steps
        return total

    of_tasks = [mean_gradient([4.0 * (j == i) for j in range(4)], lambda i=i: torch.full((4,), i), 1) for i in range(4)]
    of_tasks = torch.stack(of_tasks, dim=1) / (4 if mode == 'gradient' else 1)
    weights = [0.1, 2.4, 1.3, 0.2]
    mean = mean_gradient(weights, lambda: torch.randint(0, 4, (4,), generator=generator), 100)
    parts = torch.linalg.lstsq(of_tasks, mean[:, None]).solution.flatten()
    # Frequencies of 400 draws have a standard error of up to 0.025; weighted by 2.4, up to 0.05.
    assert parts.tolist() == pytest.approx([w / 4 for w in weights], abs=0.12)


@pytest.mark.parametrize('mode', ['sampling', 'gradient'])
def test_uniform_pretraining_is_srmodel_step_for_step(build, quick_opt, mode):
    quick_opt['drtl'].update(pipeline='pretrain', hooks=[])
    quick_opt['drtl']['weighting'].update(relation='uniform', mode=mode)
    ours = build(quick_opt)
    plain_opt = copy.deepcopy(quick_opt)
    plain_opt['model_type'] = 'SRModel'
    plain = build(plain_opt)
    plain.net_g.load_state_dict(ours.net_g.state_dict())
    plain.model_ema(0)
    for step in range(1, 4):
        ours.feed_data(episodes(ours, [0, 1]))
        plain.feed_data({'lq': ours.episode_lq.flatten(0, 1), 'gt': ours.episode_gt.flatten(0, 1)})
        for model in (ours, plain):
            model.update_learning_rate(step)
            model.optimize_parameters(step)
        assert torch.equal(parameters(ours.net_g), parameters(plain.net_g))
        assert torch.equal(parameters(ours.net_g_ema), parameters(plain.net_g_ema))
        assert ours.get_current_log()['l_pix'] == plain.get_current_log()['l_pix']


def test_weighted_sum_is_srmodel_to_round_off(build, quick_opt):
    """Weights of 1 as good as: the sum over tasks that is taken then differs by round-off, 1e-6 of the gradient."""
    quick_opt['drtl'].update(pipeline='pretrain', hooks=[])
    quick_opt['drtl']['weighting']['relation'] = 'uniform'
    ours = build(quick_opt)
    plain_opt = copy.deepcopy(quick_opt)
    plain_opt['model_type'] = 'SRModel'
    plain = build(plain_opt)
    plain.net_g.load_state_dict(ours.net_g.state_dict())
    ours._started = True
    ours.weights = torch.full((4,), 1 + 2e-7)
    for step in range(1, 4):
        ours.feed_data(episodes(ours, [0, 1]))
        plain.feed_data({'lq': ours.episode_lq.flatten(0, 1), 'gt': ours.episode_gt.flatten(0, 1)})
        for model in (ours, plain):
            model.optimize_parameters(step)
        if step == 1:
            gradients = [torch.cat([p.grad.flatten() for p in model.net_g.parameters()]) for model in (ours, plain)]
            assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[1].norm()
    # Adam's steps are of size lr, 1e-3, whatever the gradient's.
    assert (parameters(ours.net_g) - parameters(plain.net_g)).abs().mean() < 1e-3 * 1e-3


def test_losses_are_those_of_srmodel(build, quick_opt):
    class FixedPerceptual(nn.Module):
        def forward(self, x, gt):
            return (x - gt).mean().abs(), (x * gt).mean()

    quick_opt['drtl'].update(pipeline='pretrain', hooks=[])
    quick_opt['train']['pixel_opt'] = {'type': 'CharbonnierLoss', 'loss_weight': 2.0, 'reduction': 'mean'}
    model = build(quick_opt)
    model.cri_perceptual = FixedPerceptual()
    output, gt = torch.rand(2, 1, 3, 8, 8)
    total, losses = model._losses(output, gt)
    assert set(losses) == {'l_pix', 'l_percep', 'l_style'}
    charbonnier = 2 * torch.sqrt((output - gt) ** 2 + 1e-12).mean()
    assert total.item() == pytest.approx((charbonnier + (output - gt).mean().abs() + (output * gt).mean()).item())


@pytest.mark.parametrize(
    'network',
    [
        {'type': 'SwinIR', 'upscale': 4, 'img_size': 16, 'window_size': 8, 'depths': [2], 'embed_dim': 12,
         'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect'},
        {'type': 'RCAN', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_group': 1, 'num_block': 1,
         'squeeze_factor': 4, 'upscale': 4},
        {'type': 'MSRResNet', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 4},
        {'type': 'SRVGGNetCompact', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_conv': 2, 'upscale': 4},
        {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'num_grow_ch': 4},
    ],
    ids=lambda network: network['type'],
)  # fmt: skip
@pytest.mark.parametrize('algorithm', ['fomaml', 'maml', 'reptile'])
def test_any_registered_network_trains_and_adapts(build, quick_opt, network, algorithm):
    quick_opt['network_g'] = network
    quick_opt['drtl']['inner'].update(algorithm=algorithm, steps=2)
    model = build(quick_opt)
    start = parameters(model.net_g).clone()
    for step in (1, 2):
        model.feed_data(episodes(model, [0, 1]))
        model.optimize_parameters(step)
        assert np.isfinite(model.get_current_log()['l_query'])
    assert not torch.equal(parameters(model.net_g), start)
    model.adapt_to_target()
    assert not torch.equal(parameters(model.net_g_adapted), parameters(model.trained_network()))
    model.feed_data({'lq': torch.rand(1, 3, 13, 19)})  # no multiple of SwinIR's window
    model.test()
    assert model.output.shape == (1, 3, 52, 76)


def test_windows_are_padded_as_swinirmodel_does(build, quick_opt):
    from basicsr.models.swinir_model import SwinIRModel

    quick_opt['network_g'] = {
        'type': 'SwinIR', 'upscale': 4, 'img_size': 16, 'window_size': 8, 'depths': [2], 'embed_dim': 12,
        'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect',
    }  # fmt: skip
    model = build(quick_opt)
    model.feed_data({'lq': torch.rand(1, 3, 13, 16)})
    model.test()
    ours = model.output
    SwinIRModel.test(model)
    assert torch.equal(ours, model.output)


def test_large_images_are_tested_tile_by_tile(build, quick_opt):
    model = build(quick_opt)
    sides = []
    model.net_g_ema.register_forward_hook(lambda module, inputs, output: sides.append(max(inputs[0].shape[-2:])))
    model.feed_data({'lq': torch.rand(1, 3, 90, 60)})
    model.test()
    whole = model.output
    model.opt['val'].update(tile=24, overlap=8)
    model.test()
    torch.testing.assert_close(model.output, whole, rtol=1e-4, atol=1e-5)
    assert sides[0] == 90 and len(sides) == 1 + 4 * 3 and max(sides[1:]) <= 24 + 2 * 8


class TestRelation:
    def test_hook_trains_the_drn_once_and_sets_weights(self, build, quick_opt, workdir):
        model = build(quick_opt)
        before = parameters(model.net_r).clone()
        model.feed_data(episodes(model, [0, 1]))
        trained = parameters(model.net_r).clone()
        assert not torch.equal(before, trained)
        assert list(model.graph.labels) == model.library.labels
        assert model.weights.mean().item() == pytest.approx(1)
        assert model.weights.argmax() == model.graph.relation.argmax()
        kept = torch.load(workdir / 'experiments/drtl_x4/models/net_r_0.pth', weights_only=True)['params']
        assert torch.equal(kept['memory_bank.slots'], model.net_r.memory_bank.slots)
        model.feed_data(episodes(model, [0, 1]))
        assert torch.equal(parameters(model.net_r), trained)

    def test_drn_given_by_path_is_not_trained(self, build, quick_opt, workdir):
        first = build(quick_opt)
        first.feed_data(episodes(first, [0, 1]))
        quick_opt['path']['pretrain_network_r'] = str(workdir / 'experiments/drtl_x4/models/net_r_0.pth')
        second = build(quick_opt)
        second.feed_data(episodes(second, [0, 1]))
        assert torch.equal(parameters(first.net_r), parameters(second.net_r))

    def test_graph_is_refreshed_every_interval(self, build, quick_opt):
        model = build(quick_opt)
        graphs = []
        for step in range(1, 5):
            model.feed_data(episodes(model, [0, 1]))
            model.optimize_parameters(step)
            graphs.append(model.graph)
        assert graphs[1] is not graphs[0]  # interval 2: measured after the second step
        assert graphs[2] is graphs[1]
        assert graphs[3] is not graphs[2]

    def test_without_a_target_all_tasks_weigh_alike(self, build, quick_opt):
        del quick_opt['datasets']['train']['target']
        model = build(quick_opt)
        model.feed_data(episodes(model, [0, 1]))
        model.optimize_parameters(1)
        assert model.graph is None
        assert torch.equal(model.weights, torch.ones(4))

    def test_a_measurement_that_is_not_finite_leaves_the_weights_in_training(self, build, quick_opt, monkeypatch):
        warnings = []
        monkeypatch.setattr(get_root_logger(), 'warning', warnings.append)
        quick_opt['drtl']['weighting']['mode'] = 'sampling'
        model = build(quick_opt)
        model.feed_data(episodes(model, [0, 1]))
        graph, weights = model.graph, model.weights
        distort = type(model.library.tasks[2]).__call__

        def spoilt(task, gt, generator):
            return distort(task, gt, generator) * (float('nan') if task is model.library.tasks[2] else 1)

        with monkeypatch.context() as patch:
            patch.setattr(type(model.library.tasks[2]), '__call__', spoilt)
            for step in (1, 2):
                model.optimize_parameters(step)
        assert model.graph is graph and model.weights is weights
        (line,) = warnings
        name = model.library.labels[2]
        assert line.startswith(f'iteration 2: drtl.weighting.relation: the relation measured for {name} is not finite')
        for step in (3, 4):
            model.feed_data(episodes(model, [0, 1]))
            model.optimize_parameters(step)
        assert model.graph is not graph
        assert len(warnings) == 1

    def test_a_measurement_that_is_not_finite_is_refused_before_training(self, workdir, quick_opt, write_opt, capsys):
        @ESTIMATOR_REGISTRY.register()
        def broken(question):
            edges = torch.eye(5)
            edges[-1, 1] = edges[1, -1] = float('nan')
            return KnowledgeGraph(tuple(question.labels), edges)

        quick_opt['drtl']['weighting'].update(relation='broken', mode='sampling')
        try:
            assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
        finally:
            del ESTIMATOR_REGISTRY._obj_map['broken']
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith('basicsr: error: drtl.weighting.relation: the relation measured for gaussian_blur')

    def test_graph_sets_weights_by_the_options(self, build, quick_opt):
        quick_opt['drtl']['weighting'].update(temperature=1.0, floor=0.0)
        model = build(quick_opt)
        edges = torch.eye(5)
        edges[-1, :-1] = edges[:-1, -1] = torch.tensor([0.0, 0.0, 0.0, 1.0])
        model.set_graph(KnowledgeGraph(tuple('abcd'), edges))
        assert torch.allclose(model.weights, 4 * torch.softmax(edges[-1, :-1], dim=0))


@pytest.mark.parametrize(('relation', 'interval'), [('embedding', 100), ('transfer', 3), ('gradient', 1)])
def test_interrupted_training_goes_on_as_if_it_had_not_been(build, quick_opt, workdir, relation, interval):
    """Also when it was interrupted before the relation was measured."""
    quick_opt['drtl']['weighting']['relation'] = relation
    quick_opt['drtl']['hooks'][0]['interval'] = interval

    def train(model, steps):
        for step in steps:
            model.update_learning_rate(step)
            model.feed_data(episodes(model, [step % 4, 1]))
            model.optimize_parameters(step)

    whole = build(quick_opt)
    train(whole, range(1, 3))
    whole.save(epoch=0, current_iter=2)
    train(whole, range(3, 5))

    quick_opt['path']['models'] = str(workdir / 'experiments/drtl_x4/models')
    quick_opt['path']['resume_state'] = str(workdir / 'experiments/drtl_x4/training_states/2.state')
    check_resume(quick_opt, 2)  # BasicSR's own: it names the networks that belong to the state
    resumed = build(quick_opt)
    state = torch.load(quick_opt['path']['resume_state'], weights_only=True)
    resumed.resume_training(state)
    assert (resumed.graph is None) == (relation == 'transfer')
    train(resumed, range(3, 5))
    assert torch.equal(parameters(resumed.net_g), parameters(whole.net_g))
    assert torch.equal(parameters(resumed.net_g_ema), parameters(whole.net_g_ema))
    assert torch.equal(resumed.weights, whole.weights)
    assert torch.equal(resumed.graph.edges, whole.graph.edges)


def test_draws_depend_on_seed_step_and_purpose_alone(build, quick_opt):
    model, other = build(quick_opt), build(quick_opt)
    model.relation_evidence(3)  # whatever was drawn before

    def draws(model, purpose='a'):
        return tuple(torch.rand((), generator=generator).item() for generator in model.generators(purpose))

    found = {draws(model)}
    assert {draws(model), draws(other)} == found
    found.add(draws(model, 'b'))
    model.num_update = 1
    found.add(draws(model))
    model.opt['manual_seed'] += 1
    found.add(draws(model))
    assert len({number for pair in found for number in pair}) == 8
    model.num_update, model.opt['manual_seed'] = other.num_update, other.opt['manual_seed']
    evidence = [vars(model.relation_evidence(3)).values() for model in (model, other)]
    assert all(map(torch.equal, *evidence))


def test_states_hold_nothing_of_a_device(build, quick_opt):
    model = build(quick_opt)
    model.feed_data(episodes(model, [0, 1]))
    model.save(epoch=0, current_iter=1)
    state = torch.load(f'{model.opt["path"]["training_states"]}/1.state', weights_only=True)
    assert not [key for key in state if 'generator' in key]


def test_checkpointing_takes_the_same_step(build, quick_opt):
    quick_opt['drtl'].update(pipeline='meta', hooks=[])
    quick_opt['drtl']['weighting'].update(relation='uniform')
    steps = []
    for checkpoint in (False, True):
        quick_opt['drtl']['inner'] = {'algorithm': 'maml', 'steps': 2, 'checkpoint': checkpoint}
        model = build(quick_opt)
        model.feed_data(episodes(model, [0, 1]))
        model.optimize_parameters(1)
        steps.append(torch.cat([p.grad.flatten() for p in model.net_g.parameters()]))
    assert torch.allclose(*steps, rtol=1e-4, atol=1e-7)


class TestInnerRates:
    def test_meta_sgd_learns_a_rate_for_each_weight_and_resumes(self, build, quick_opt, workdir):
        quick_opt['drtl']['inner'].update(rate_lr=1e-3)
        quick_opt['drtl']['hooks'][0]['interval'] = 100
        model = build(quick_opt)
        for step in (1, 2):
            model.feed_data(episodes(model, [0, 1]))
            model.optimize_parameters(step)
        rates = torch.cat([rate.detach().flatten() for rate in model.inner_rates.values()])
        assert rates.shape == parameters(model.net_g).shape
        # Adam's first steps are of its learning rate.
        assert (rates - 1e-2).abs().max() == pytest.approx(2e-3, rel=0.05)
        model.save(epoch=0, current_iter=2)
        state = torch.load(workdir / 'experiments/drtl_x4/training_states/2.state', weights_only=True)
        resumed = build(quick_opt)
        resumed.resume_training(state)
        assert torch.equal(torch.cat([rate.flatten() for rate in resumed.inner_rates.values()]), rates)
        assert len(resumed.optimizer_rates.state) == len(model.inner_rates)

    def test_learned_rates_are_saved_and_taken_up(self, build, quick_opt, workdir):
        quick_opt['drtl']['inner'].update(rate_lr=1e-3)
        model = build(quick_opt)
        model.feed_data(episodes(model, [0, 1]))
        model.optimize_parameters(1)
        model.save(epoch=0, current_iter=1)
        quick_opt['drtl']['inner'].update(rate_lr=0)
        quick_opt['path']['pretrain_inner_rates'] = str(workdir / 'experiments/drtl_x4/models/inner_rates_1.pth')
        fixed = build(quick_opt)
        assert not fixed.learns_rates
        for name, rate in model.inner_rates.items():
            assert torch.equal(fixed.inner_rates[name], rate.detach())
        quick_opt['drtl']['inner'].update(parameters=['conv_last.*'])
        with pytest.raises(OptionError, match='those of other parameters'):
            build(quick_opt)

    def test_states_with_and_without_rates_are_told_apart(self, build, quick_opt, workdir):
        model = build(quick_opt)
        model.feed_data(episodes(model, [0, 1]))
        model.save(epoch=0, current_iter=1)
        state = torch.load(workdir / 'experiments/drtl_x4/training_states/1.state', weights_only=True)
        quick_opt['drtl']['inner'].update(rate_lr=1e-3)
        with pytest.raises(OptionError, match=r'drtl\.inner\.rate_lr'):
            build(quick_opt).resume_training(state)

    def test_patterns_limit_the_inner_loop(self, build, quick_opt):
        quick_opt['drtl']['inner'].update(parameters=['conv_last.*'])
        assert set(build(quick_opt).inner_rates) == {'conv_last.weight', 'conv_last.bias'}

    def test_patterns_that_fit_nothing_are_named(self, build, quick_opt):
        quick_opt['drtl']['inner'].update(parameters=['head.*'])
        with pytest.raises(OptionError, match=r"drtl.inner.parameters: 'head.\*' fits none"):
            build(quick_opt)


class TestBfloat16:
    @pytest.fixture(autouse=True)
    def imitated(self, monkeypatch):
        """Processors that cannot compute in bfloat16 give the same numbers slowly."""
        monkeypatch.setattr(drtl_model, 'computes_bfloat16', lambda device: True)

    def test_devices_that_cannot_compute_in_single_precision_and_say_so(self, build, quick_opt, monkeypatch):
        monkeypatch.setattr(drtl_model, 'computes_bfloat16', lambda device: False)
        warning = mock.Mock()
        monkeypatch.setattr(get_root_logger(), 'warning', warning)
        quick_opt['drtl'].update(hooks=[])
        gradients = []
        for amp in (None, 'bf16'):
            quick_opt['train']['amp'] = amp
            torch.manual_seed(0)
            model = build(quick_opt)
            model._started = True
            model.feed_data(episodes(model, [0, 1]))
            model.optimize_parameters(1)
            gradients.append(torch.cat([p.grad.flatten() for p in model.net_g.parameters()]))
        assert torch.equal(*gradients)
        warning.assert_called_once()
        assert warning.call_args.args[0].startswith('train.amp: this device cannot compute in bfloat16')

    @pytest.mark.parametrize('pipeline', ['pretrain', 'meta'])
    def test_gradients_are_those_of_single_precision_but_for_rounding(self, build, quick_opt, pipeline):
        gradients = []
        for amp in (None, 'bf16'):
            quick_opt['drtl'].update(pipeline=pipeline, hooks=[])
            quick_opt['drtl']['weighting']['relation'] = 'uniform'
            quick_opt['train']['amp'] = amp
            torch.manual_seed(0)
            model = build(quick_opt)
            model.feed_data(episodes(model, [0, 1]))
            model.optimize_parameters(1)
            assert {p.dtype for p in model.net_g.parameters()} == {torch.float32}
            gradients.append(torch.cat([p.grad.flatten() for p in trainable_parameters(model.net_g).values()]))
        single, half = gradients
        assert not torch.equal(single, half)
        # 8 bits of mantissa: 2^-8 a rounding
        assert (half - single).norm() < 0.05 * single.norm()

    @pytest.mark.parametrize(
        ('pipeline', 'algorithm', 'checkpoint'),
        [
            ('pretrain', 'fomaml', False),
            ('meta', 'fomaml', False),
            ('meta', 'maml', False),
            ('meta', 'maml', True),
            ('meta', 'reptile', False),
        ],
    )
    @pytest.mark.parametrize('weights', [(1.0, 1.0), (0.5, 1.5)])
    def test_backward_passes_run_outside_autocast(
        self, build, quick_opt, monkeypatch, pipeline, algorithm, checkpoint, weights
    ):
        """In steps with their target term, in the relations that take gradients, and in adaptation."""
        monkeypatch.setattr(AutocastRecord, 'forwards', [])
        monkeypatch.setattr(AutocastRecord, 'backwards', [])
        quick_opt['train']['amp'] = 'bf16'
        quick_opt['drtl'].update(pipeline=pipeline, hooks=[], target_weight=0.5)
        quick_opt['drtl']['inner'].update(algorithm=algorithm, steps=2, checkpoint=checkpoint)
        quick_opt['drtl']['weighting']['relation'] = 'transfer'
        model = build(quick_opt)
        model.net_g.register_forward_hook(lambda net, inputs, output: AutocastRecord.apply(output))
        model.net_g_ema.register_forward_hook(lambda net, inputs, output: AutocastRecord.apply(output))
        model._started = True
        model.weights = torch.tensor([*weights, 1.0, 1.0])

        def assert_only_forward_passes_were_in_it():
            assert AutocastRecord.forwards and all(AutocastRecord.forwards)
            assert AutocastRecord.backwards and not any(AutocastRecord.backwards)
            AutocastRecord.forwards.clear()
            AutocastRecord.backwards.clear()

        model.feed_data(episodes(model, [0, 1]))
        model.optimize_parameters(1)
        assert_only_forward_passes_were_in_it()
        evidence = model.relation_evidence(4)
        ask = RelationQuestion(
            *(model.library.labels, lambda: evidence, None, model.net_g, model.criterion, 1),
            precision=model.precision,
        )
        for relation in ('gradient', 'transfer'):
            ESTIMATOR_REGISTRY.get(relation)(ask)
            assert_only_forward_passes_were_in_it()
        model.adapt_to_target()
        assert_only_forward_passes_were_in_it()

    def test_adaptation_and_relations_use_it(self, build, quick_opt):
        results = []
        for amp in (None, 'bf16'):
            quick_opt['train']['amp'] = amp
            quick_opt['drtl']['weighting']['relation'] = 'transfer'
            torch.manual_seed(0)
            model = build(quick_opt)
            next(hook for hook in model.hooks if hasattr(hook, 'measure')).measure(model)
            model.adapt_to_target()
            results.append((parameters(model.net_g_adapted), model.graph.relation))
        (single, relation), (half, half_relation) = results
        assert not torch.equal(single, half)
        assert torch.allclose(single, half, atol=1e-3)
        assert not torch.equal(relation, half_relation)


class TestLayout:
    def test_networks_are_trained_in_what_the_processor_likes(self, build, quick_opt, monkeypatch):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            monkeypatch.setattr(drtl_model, 'training_format', lambda device, chosen=memory_format: chosen)
            model = build(quick_opt)
            model._started = True
            model.feed_data(episodes(model, [0, 1]))
            model.optimize_parameters(1)
            model.adapt_to_target()
            for net in (model.net_g, model.net_g_ema, model.net_g_adapted):
                assert net.conv_last.weight.is_contiguous(memory_format=memory_format)
            assert model.net_g.conv_last.weight.grad.is_contiguous(memory_format=memory_format)

    def test_uniform_pretraining_is_laid_out_as_srmodel(self, build, quick_opt, monkeypatch):
        monkeypatch.setattr(drtl_model, 'training_format', lambda device: torch.channels_last)
        quick_opt['drtl']['pipeline'] = 'pretrain'
        quick_opt['drtl']['weighting']['relation'] = 'uniform'
        assert build(quick_opt).net_g.conv_last.weight.is_contiguous()


@pytest.mark.parametrize('pipeline', ['pretrain', 'meta'])
def test_a_step_fetches_one_number_from_the_device(build, quick_opt, monkeypatch, pipeline):
    """Whether all of it is finite; losses stay on the device until they are printed."""
    quick_opt['drtl'].update(pipeline=pipeline, hooks=[])
    quick_opt['drtl']['weighting'].update(relation='uniform', mode='sampling')
    model = build(quick_opt)
    model.feed_data(episodes(model, [0, 1]))
    # Gradient weights and Adam's count of its steps are on the host anyway.
    monkeypatch.setattr(drtl_model, 'effective_number', lambda weights: 1.0)
    monkeypatch.setattr(model.optimizer_g, 'step', lambda: None)
    model.optimize_parameters(1)  # draws the first graph
    with watch_fetches() as fetched:
        model.optimize_parameters(2)
        assert len(fetched) == 1
        model.get_current_log()
    assert len(fetched) > 1


class TestCompiled:
    @pytest.fixture
    def traced(self, monkeypatch):
        """Networks as torch.compile traces and differentiates them, without the minute of making machine code."""
        torch.compiler.reset()
        compile_function, graphs = torch.compile, []

        def backend(graph, inputs):
            graphs.append(graph)
            return lookup_backend('aot_eager')(graph, inputs)

        monkeypatch.setattr(torch, 'compile', lambda function: compile_function(function, backend=backend))
        return graphs

    @pytest.mark.parametrize(
        ('pipeline', 'algorithm'), [('pretrain', 'fomaml'), ('meta', 'fomaml'), ('meta', 'reptile')]
    )
    def test_steps_are_those_of_the_plain_network(self, build, quick_opt, traced, pipeline, algorithm):
        quick_opt['drtl'].update(pipeline=pipeline, hooks=[])
        quick_opt['drtl']['inner'].update(algorithm=algorithm, steps=2)
        quick_opt['drtl']['weighting']['relation'] = 'uniform'
        quick_opt['train']['ema_decay'] = 0  # so that net_g itself is validated
        gradients, names = [], []
        for compiled in (False, True):
            quick_opt['train']['compile'] = compiled
            torch.manual_seed(0)
            model = build(quick_opt)
            names.append(list(model.net_g.state_dict()))
            traced.clear()  # of the trial
            for step in range(1, 3):
                model.feed_data(episodes(model, [0, 1]))
                model.optimize_parameters(step)
            gradients.append(torch.cat([p.grad.flatten() for p in model.net_g.parameters()]))
            assert bool(traced) == compiled
        assert names[0] == names[1]
        plain, fast = gradients
        assert (plain - fast).norm() <= 1e-5 * plain.norm()
        # Neither validation, in any size, nor adaptation is waited for.
        made = len(traced)
        model.lq = torch.rand(1, 3, 17, 23)
        model.test()
        model.adapt_to_target()
        assert len(traced) == made

    def test_what_is_differentiated_twice_is_refused(self, build, quick_opt):
        quick_opt['drtl'].update(pipeline='meta')
        quick_opt['drtl']['inner']['algorithm'] = 'maml'
        quick_opt['train']['compile'] = True
        with pytest.raises(OptionError, match=r'train.compile: .* differentiated twice'):
            build(quick_opt)

    def test_a_machine_without_a_compiler_is_told(self, build, quick_opt, monkeypatch):
        def no_compiler(function):
            raise RuntimeError('No working C++ compiler found\nmore')

        monkeypatch.setattr(torch, 'compile', no_compiler)
        quick_opt['train']['compile'] = True
        with pytest.raises(OptionError, match=r'train.compile: .*\(No working C\+\+ compiler found\)'):
            build(quick_opt)

    @pytest.mark.slow
    def test_machine_code_gives_the_same_steps(self, build, quick_opt):
        quick_opt['drtl'].update(pipeline='meta', hooks=[])
        quick_opt['drtl']['weighting']['relation'] = 'uniform'
        gradients = []
        for compiled in (False, True):
            quick_opt['train']['compile'] = compiled
            torch.manual_seed(0)
            model = build(quick_opt)
            model.feed_data(episodes(model, [0, 1]))
            model.optimize_parameters(1)
            gradients.append(torch.cat([p.grad.flatten() for p in model.net_g.parameters()]))
        assert (gradients[1] - gradients[0]).norm() <= 1e-4 * gradients[0].norm()


class TestAdaptation:
    def adapted(self, build, quick_opt, **options):
        quick_opt['drtl']['adapt'].update(steps=4, **options)
        torch.manual_seed(0)
        model = build(quick_opt)
        model.adapt_to_target()
        return model

    def test_replay_draws_auxiliary_patches_by_weight(self, build, quick_opt, monkeypatch):
        model = self.adapted(build, quick_opt, replay=0.5, batch_size=4)
        model.weights = torch.tensor([0.0, 0.0, 4.0, 0.0])
        drawn = []
        monkeypatch.setattr(
            'drtl_plugin.models.drtl_model.adaptation', lambda net, criterion, batches, *_: drawn.extend(batches)
        )
        model.adaptation_course(model.target_pairs, 3)
        assert [lq.shape for lq, _ in drawn] == [(4, 3, 16, 16)] * 3
        for lq, gt in drawn:
            residual = (lq - nn.functional.interpolate(gt, scale_factor=0.25, mode='bicubic', antialias=True)).abs()
            # the third task is noise of 5 to 10 grey levels
            assert residual[2:].mean(dim=(1, 2, 3)).min() > 3 / 255

    @pytest.mark.parametrize('options', [{'replay': 1.0}, {'rank': 2}, {'optimizer': 'inner'}, {'early_stop': True}])
    def test_ways_to_adapt_differ_and_repeat(self, build, quick_opt, options):
        plain = self.adapted(build, copy.deepcopy(quick_opt))
        model = self.adapted(build, copy.deepcopy(quick_opt), **options)
        result = parameters(model.net_g_adapted)
        assert result.shape == parameters(model.net_g).shape
        # Early stopping may find that all steps are best.
        assert options == {'early_stop': True} or not torch.equal(result, parameters(plain.net_g_adapted))
        model.adapt_to_target()
        assert torch.equal(parameters(model.net_g_adapted), result)

    def test_early_stop_holds_pairs_out_then_adapts_to_all(self, build, quick_opt, monkeypatch):
        model = self.adapted(build, quick_opt, early_stop=True)
        adapted_to, judged_by = [], []
        course, patches = model.adaptation_course, model._target_patches

        def spied_course(pairs, steps):
            adapted_to.append(([id(lq) for lq, _ in pairs], steps))
            return course(pairs, steps)

        def spied_patches(num, generator, pairs=None):
            if num == 32:  # of the held-out pairs
                judged_by.extend(id(lq) for lq, _ in pairs)
            return patches(num, generator, pairs)

        monkeypatch.setattr(model, 'adaptation_course', spied_course)
        monkeypatch.setattr(model, '_target_patches', spied_patches)
        monkeypatch.setattr('drtl_plugin.models.drtl_model.best_step', lambda *_: 2)
        model.adapt_to_target()
        (others, first), (everything, second) = adapted_to
        assert (len(others), first, len(everything), second) == (4, 4, 5, 2)
        assert len(judged_by) == 1
        assert set(others) | set(judged_by) == set(everything)

    @pytest.mark.parametrize(
        ('replay', 'batch_size', 'expected'), [(0.05, 8, 1), (0.95, 8, 7), (0.5, 8, 4), (1.0, 8, 8)]
    )
    def test_replay_is_a_share_of_each_batch(self, build, quick_opt, monkeypatch, replay, batch_size, expected):
        model = self.adapted(build, quick_opt, replay=replay, batch_size=batch_size)
        replayed = []
        patches = model._replayed_patches
        monkeypatch.setattr(model, '_replayed_patches', lambda num, *g: replayed.append(num) or patches(num, *g))
        model.adapt_to_target()
        assert replayed == [expected] * 4

    def test_progress_counts_the_steps(self, build, quick_opt, monkeypatch, caplog):
        monkeypatch.setattr('drtl_plugin.runtime.progress._FIRST', 0)
        monkeypatch.setattr('drtl_plugin.runtime.progress._INTERVAL', 0)
        monkeypatch.setattr(get_root_logger(), 'propagate', True)
        caplog.set_level('INFO', 'basicsr')
        self.adapted(build, quick_opt)
        counts = dict.fromkeys(line for line in caplog.messages if line.startswith('adaptation: '))
        assert list(counts) == [f'adaptation: {step} of 4 steps' for step in range(1, 5)]

    def test_early_stop_needs_two_pairs(self, build, quick_opt):
        quick_opt['datasets']['train']['target']['num_shot'] = 1
        with pytest.raises(OptionError, match=r'drtl.adapt.early_stop: .* at least 2 pairs'):
            self.adapted(build, quick_opt, early_stop=True)


@pytest.mark.parametrize('relation', ['gradient', 'transfer'])
def test_relations_that_ask_the_network_wait_until_it_has_learned(build, quick_opt, relation):
    quick_opt['drtl']['weighting']['relation'] = relation
    model = build(quick_opt)
    for step in (1, 2):
        model.feed_data(episodes(model, [0, 1]))
        assert model.graph is None
        model.optimize_parameters(step)
    assert model.graph is not None  # measured after the interval of 2
    assert model.net_r is None


def test_states_of_other_tasks_are_refused(build, quick_opt):
    model = build(quick_opt)
    model.feed_data(episodes(model, [0, 1]))
    model.save(epoch=0, current_iter=1)
    state = torch.load(f'{model.opt["path"]["training_states"]}/1.state', weights_only=True)
    quick_opt['datasets']['train']['distortions'].reverse()
    with pytest.raises(OptionError, match='not the tasks that the run to resume has learned'):
        build(quick_opt).resume_training(state)


class TestCameraFit:
    def test_it_is_a_task_like_any_other(self, build, quick_opt):
        quick_opt['drtl']['camera_fit'] = True
        model = build(quick_opt)
        assert model.library.labels[-1] == 'camera fit'
        assert {model.task_data[i]['task'] for i in range(40)} == {0, 1, 2, 3, 4}
        batch = episodes(model, [0, 4])
        model.feed_data(batch)
        assert model.graph.labels[-1] == 'camera fit'
        assert len(model.weights) == 5
        # What that episode holds is what the camera makes of its ground truth, but for the noise.
        made = model.camera_fit(model.episode_gt[1], torch.Generator().manual_seed(7))
        noise = (model.camera_fit.noise.sum() ** 0.5).item()
        assert (model.episode_lq[1] - made).abs().mean() < 2 * noise
        assert (model.episode_lq[0] - made).abs().mean() > 2 * (model.episode_lq[1] - made).abs().mean()

    def test_auxiliary_photographs_are_made_as_soft_as_the_cameras(self, build, quick_opt):
        quick_opt['drtl']['camera_fit'] = True
        model = build(quick_opt)
        model.camera_fit = dataclasses.replace(model.camera_fit, gt_sigma=1.0)
        batch = episodes(model, [0, 1])
        model.feed_data(batch)
        expected = model.camera_fit.ground_truth(batch['query_gt'].flatten(0, 1)).view_as(batch['query_gt'])
        assert torch.equal(model.episode_gt[:, 1:], expected)
        assert not torch.equal(expected, batch['query_gt'])

    def test_a_camera_is_fitted_once_a_run(self, build, quick_opt, monkeypatch):
        quick_opt['drtl']['camera_fit'] = True
        calls = []
        fit_camera = drtl_model.fit_camera
        monkeypatch.setattr(drtl_model, '_FITS', {})
        monkeypatch.setattr(drtl_model, 'fit_camera', lambda *pairs: calls.append(1) or fit_camera(*pairs))
        fits = [build(quick_opt).camera_fit for _ in range(2)]
        assert fits[0] is fits[1] and len(calls) == 1
        quick_opt['datasets']['train']['target']['num_shot'] = 4
        assert build(quick_opt).camera_fit is not fits[0] and len(calls) == 2

    def test_a_fit_given_by_path_is_taken(self, build, quick_opt, tmp_path, monkeypatch):
        quick_opt['drtl']['camera_fit'] = True
        path = tmp_path / 'fit.pth'
        fit = build(quick_opt).camera_fit
        torch.save(fit.state(), path)
        monkeypatch.delattr('drtl_plugin.models.drtl_model.fit_camera')
        quick_opt['path']['pretrain_camera_fit'] = str(path)
        assert torch.equal(build(quick_opt).camera_fit.kernel, fit.kernel)
        torch.save(dataclasses.replace(fit, scale=2).state(), path)
        with pytest.raises(OptionError, match='is of scale 2, not of 4'):
            build(quick_opt)
        torch.save({'params': {}}, path)
        with pytest.raises(DataError, match=r'path\.pretrain_camera_fit: .*fit\.pth is not a camera fit'):
            build(quick_opt)

    def test_without_a_target_there_is_nothing_to_fit(self, build, quick_opt):
        quick_opt['drtl']['camera_fit'] = True
        del quick_opt['datasets']['train']['target']
        model = build(quick_opt)
        assert model.camera_fit is None
        assert {model.task_data[i]['task'] for i in range(40)} == {0, 1, 2, 3}

    def test_it_has_its_share_of_the_weights_from_the_start(self, build, quick_opt):
        quick_opt['drtl']['camera_fit'] = True
        quick_opt['drtl']['weighting'].update(fit_share=0.8, relation='uniform')
        model = build(quick_opt)
        assert torch.allclose(model.weights, torch.tensor([0.2, 0.2, 0.2, 0.2, 4.2]))
        model.start()
        assert torch.allclose(model.weights, torch.tensor([0.2, 0.2, 0.2, 0.2, 4.2]))

    def test_pairs_that_are_too_small_to_fit_are_named(self, build, quick_opt, tmp_path):
        for folder, side in (('gt', 64), ('lq', 16)):
            (tmp_path / folder).mkdir()
            cv2.imwrite(str(tmp_path / folder / 'a.png'), np.zeros((side, side, 3), np.uint8))
            quick_opt['datasets']['train']['target'][f'dataroot_{folder}'] = str(tmp_path / folder)
        quick_opt['datasets']['train']['target']['num_shot'] = 1
        quick_opt['drtl']['camera_fit'] = True
        with pytest.raises(DataError, match=r'drtl\.camera_fit: .* camera_fit: false'):
            build(quick_opt)

    def test_replay_from_the_supports_own_ground_truth(self, build, quick_opt, monkeypatch):
        quick_opt['drtl']['camera_fit'] = True
        quick_opt['drtl']['adapt'].update(replay=1.0, replay_source='support', batch_size=3)
        model = build(quick_opt)
        drawn = []
        monkeypatch.setattr(
            'drtl_plugin.models.drtl_model.adaptation', lambda net, criterion, batches, *_: drawn.extend(batches)
        )
        model.adaptation_course(model.target_pairs[:1], 2)
        whole = model.target_pairs[0][1].float() / 255
        for lq, gt in drawn:
            assert lq.shape == (3, 3, 16, 16)
            expected = model.camera_fit(gt, torch.Generator().manual_seed(1))
            assert (lq - expected).abs().mean() < 0.05  # the noise is another
            for patch in gt:  # each is somewhere in that pair, up to flips
                turned = [p.flip(dims) for p in (patch, patch.mT) for dims in ((), (1,), (2,), (1, 2))]
                corners = whole[0].unfold(0, 64, 4).unfold(1, 64, 4)
                assert any((corners - p[0]).abs().amax(dim=(2, 3)).min() < 1e-6 for p in turned)

    def test_that_replay_needs_the_fit(self, build, quick_opt):
        quick_opt['drtl']['adapt'].update(replay=0.5, replay_source='support')
        with pytest.raises(OptionError, match=r'drtl\.adapt\.replay_source: support needs drtl\.camera_fit'):
            build(quick_opt)

    def test_its_label_is_its_own(self, build, quick_opt):
        quick_opt['drtl']['camera_fit'] = True
        quick_opt['datasets']['train']['distortions'][0]['label'] = 'camera fit'
        with pytest.raises(OptionError, match="labelled 'camera fit'"):
            build(quick_opt)


def test_networks_are_saved_before_the_state_that_needs_them(build, quick_opt, monkeypatch):
    model = build(quick_opt)
    model.feed_data(episodes(model, [0, 1]))
    saved = []
    monkeypatch.setattr(model, 'save_network', lambda net, label, *_, **__: saved.append(label))
    monkeypatch.setattr(model, 'save_training_state', lambda *_: saved.append('state'))
    model.save(epoch=0, current_iter=1)
    assert saved == ['net_g_adapted', 'net_r', 'net_g', 'state']


def test_states_of_other_models_are_refused(build, quick_opt):
    model = build(quick_opt)
    with pytest.raises(OptionError, match='not a training state of a DRTLModel'):
        model.resume_training({'iter': 1, 'optimizers': [], 'schedulers': []})


def test_adaptation_leaves_the_course_of_training_alone(build, quick_opt):
    models = [build(quick_opt), build(quick_opt)]
    models[1].net_g.load_state_dict(models[0].net_g.state_dict())
    models[1].net_g_ema.load_state_dict(models[0].net_g_ema.state_dict())
    models[1].net_r.load_state_dict(models[0].net_r.state_dict())
    for step in (1, 2):
        for model in models:
            model.feed_data(episodes(model, [0, 1]))
            model.optimize_parameters(step)
        models[1].adapt_to_target()
    assert torch.equal(parameters(models[0].net_g), parameters(models[1].net_g))


def test_log_holds_plain_numbers(build, quick_opt):
    model = build(quick_opt)
    model.feed_data(episodes(model, [0, 1]))
    model.optimize_parameters(1)
    log = model.get_current_log()
    assert isinstance(log, OrderedDict)
    assert all(isinstance(value, float) for value in log.values())
    assert 1 <= log['effective_tasks'] <= 4


def test_shipped_rrdb_options_differ_in_network_name_and_schedule_only():
    from tests.conftest import OPTIONS

    edsr, rrdb = (load_option_file(str(OPTIONS / f'{name}.yml')) for name in ('drtl_x4', 'drtl_rrdb_x4'))
    assert rrdb['network_g']['type'] == 'RRDBNet'
    for opt in (edsr, rrdb):
        for key in ('network_g', 'name'):
            del opt[key]
        for section, key in (
            ('train', 'total_iter'), ('train', 'scheduler'), ('val', 'val_freq'), ('logger', 'save_checkpoint_freq')
        ):  # fmt: skip
            del opt[section][key]
        del opt['train']['optim_g']['lr']
    assert edsr == rrdb
