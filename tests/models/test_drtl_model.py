import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from basicsr.models import build_model
from torch import nn

from drtl_plugin.errors import OptionError
from drtl_plugin.meta.learner import functional_loss, outer_gradient, trainable_parameters
from drtl_plugin.models.drtl_model import DRTLModel
from drtl_plugin.options import load_option_file, parse_options
from drtl_plugin.relation.graph import KnowledgeGraph
from tests.test_options import arguments


@pytest.fixture
def build(workdir, write_opt):
    """Build a model from options as the command line does, with its folders there."""

    def build_from(opt: dict):
        parsed = parse_options(arguments(write_opt(opt)), str(workdir), is_train=True)
        for key in ('models', 'training_states', 'visualization'):
            (workdir / parsed['path'][key]).mkdir(parents=True, exist_ok=True)
        return build_model(parsed)

    return build_from


def episodes(model: DRTLModel, tasks: list[int]) -> dict:
    items = [model.task_data[i] for i in range(len(tasks))]
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0] if key != 'task'}
    return {**batch, 'task': torch.tensor(tasks)}


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
            gradient, _ = outer_gradient(
                loss, trainable_parameters(net), (lq[:1], gt[:1]), (lq[1:], gt[1:]), 1e-2, 1, first_order=True
            )
            expected = expected + weight / 2 * torch.cat([g.flatten() for g in gradient.values()])
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
        for _ in range(100):
            model.feed_data(episodes(model, [0, 0]))
            drawn += torch.bincount(torch.tensor(model.episode_tasks), minlength=4)
        assert drawn[3] == 0
        assert (drawn / 200).tolist() == pytest.approx((self.WEIGHTS / 4).tolist(), abs=0.12)
        net = copy.deepcopy(model.net_g)
        model.optimize_parameters(1)
        nn.functional.l1_loss(net(model.episode_lq.flatten(0, 1)), model.episode_gt.flatten(0, 1)).backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.net_g.parameters(), net.parameters()))


def test_uniform_pretraining_is_srmodel_step_for_step(build, quick_opt):
    quick_opt['drtl'].update(pipeline='pretrain', hooks=[])
    quick_opt['drtl']['weighting']['relation'] = 'uniform'
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
@pytest.mark.parametrize('algorithm', ['fomaml', 'maml'])
def test_any_registered_network_trains_and_adapts(build, quick_opt, network, algorithm):
    quick_opt['network_g'] = network
    quick_opt['drtl']['inner']['algorithm'] = algorithm
    model = build(quick_opt)
    start = parameters(model.net_g).clone()
    for step in (1, 2):
        model.feed_data(episodes(model, [0, 1]))
        model.optimize_parameters(step)
        assert np.isfinite(model.get_current_log()['l_query'])
    assert not torch.equal(parameters(model.net_g), start)
    model.adapt_to_target()
    assert not torch.equal(parameters(model.net_g_adapted), parameters(model._trained_network()))
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

    def test_graph_sets_weights_by_the_options(self, build, quick_opt):
        quick_opt['drtl']['weighting'].update(temperature=1.0, floor=0.0)
        model = build(quick_opt)
        edges = torch.eye(5)
        edges[-1, :-1] = edges[:-1, -1] = torch.tensor([0.0, 0.0, 0.0, 1.0])
        model.set_graph(KnowledgeGraph(tuple('abcd'), edges))
        assert torch.allclose(model.weights, 4 * torch.softmax(edges[-1, :-1], dim=0))


def test_interrupted_training_goes_on_as_if_it_had_not_been(build, quick_opt, workdir):
    quick_opt['drtl']['hooks'][0]['interval'] = 100

    def train(model, steps):
        for step in steps:
            model.update_learning_rate(step)
            model.feed_data(episodes(model, [step % 4, 1]))
            model.optimize_parameters(step)

    whole = build(quick_opt)
    train(whole, range(1, 3))
    whole.save(epoch=0, current_iter=2)
    train(whole, range(3, 5))

    for name in ('g', 'r'):
        quick_opt['path'][f'pretrain_network_{name}'] = str(workdir / f'experiments/drtl_x4/models/net_{name}_2.pth')
    resumed = build(quick_opt)
    state = torch.load(workdir / 'experiments/drtl_x4/training_states/2.state', weights_only=True)
    resumed.resume_training(state)
    assert torch.equal(resumed.graph.edges, whole.graph.edges)
    train(resumed, range(3, 5))
    assert torch.equal(parameters(resumed.net_g), parameters(whole.net_g))
    assert torch.equal(parameters(resumed.net_g_ema), parameters(whole.net_g_ema))
    assert torch.equal(resumed.weights, whole.weights)


def test_states_of_other_tasks_are_refused(build, quick_opt):
    model = build(quick_opt)
    model.feed_data(episodes(model, [0, 1]))
    model.save(epoch=0, current_iter=1)
    state = torch.load(f'{model.opt["path"]["training_states"]}/1.state', weights_only=True)
    quick_opt['datasets']['train']['distortions'].reverse()
    with pytest.raises(OptionError, match='not the tasks that the run to resume has learned'):
        build(quick_opt).resume_training(state)


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
