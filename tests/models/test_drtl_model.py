"""DRTLModel against SRModel; training, saving and resuming."""

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.utils.misc import check_resume

from drtl_plugin.archs import TransferRelationNet
from drtl_plugin.errors import OptionError
from drtl_plugin.models import drtl_model
from drtl_plugin.options.file import load_option_file
from tests.conftest import OPTIONS
from tests.fetches import watch_fetches
from tests.models.helpers import feed, parameters, skip_start


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
        feed(ours, [0, 1])
        plain.feed_data({'lq': ours.batch.lq.flatten(0, 1), 'gt': ours.batch.gt.flatten(0, 1)})
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
    skip_start(ours)
    ours.weights = torch.full((4,), 1 + 2e-7)
    for step in range(1, 4):
        feed(ours, [0, 1])
        plain.feed_data({'lq': ours.batch.lq.flatten(0, 1), 'gt': ours.batch.gt.flatten(0, 1)})
        for model in (ours, plain):
            model.optimize_parameters(step)
        if step == 1:
            gradients = [torch.cat([p.grad.flatten() for p in model.net_g.parameters()]) for model in (ours, plain)]
            assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[1].norm()
    # Adam's steps are of size lr, 1e-3, whatever the gradient's.
    assert (parameters(ours.net_g) - parameters(plain.net_g)).abs().mean() < 1e-3 * 1e-3


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
        feed(model, [0, 1])
        model.optimize_parameters(step)
        assert np.isfinite(model.get_current_log()['l_query'])
    assert not torch.equal(parameters(model.net_g), start)
    model.adapt_to_target()
    assert not torch.equal(parameters(model.net_g_adapted), parameters(model.trained_network()))
    model.feed_data({'lq': torch.rand(1, 3, 13, 19)})  # no multiple of SwinIR's window
    model.test()
    assert model.output.shape == (1, 3, 52, 76)


@pytest.mark.parametrize(('relation', 'interval'), [('embedding', 100), ('transfer', 3), ('gradient', 1)])
def test_interrupted_training_goes_on_as_if_it_had_not_been(build, quick_opt, workdir, relation, interval):
    """Also when it was interrupted before the relation was measured."""
    quick_opt['drtl']['weighting']['relation'] = relation
    quick_opt['drtl']['hooks'][0]['interval'] = interval

    def train(model, steps):
        for step in steps:
            model.update_learning_rate(step)
            feed(model, [step % 4, 1])
            model.optimize_parameters(step)

    whole = build(quick_opt)
    train(whole, range(1, 3))
    whole.save(epoch=0, current_iter=2)
    train(whole, range(3, 5))

    quick_opt['path']['models'] = str(workdir / 'experiments/drtl_x4/models')
    quick_opt['path']['resume_state'] = str(workdir / 'experiments/drtl_x4/training_states/2.state')
    check_resume(quick_opt, 2)  # BasicSR's own: it names the networks that belong to the state
    del quick_opt['path']['models']
    resumed = build(quick_opt)
    state = torch.load(quick_opt['path']['resume_state'], weights_only=True)
    resumed.resume_training(state)
    assert (resumed.graph is None) == (relation == 'transfer')
    train(resumed, range(3, 5))
    assert torch.equal(parameters(resumed.net_g), parameters(whole.net_g))
    assert torch.equal(parameters(resumed.net_g_ema), parameters(whole.net_g_ema))
    assert torch.equal(resumed.weights, whole.weights)
    assert torch.equal(resumed.graph.edges, whole.graph.edges)


class TestPredictedTransfer:
    """The relation whose DRN is shipped."""

    @pytest.fixture
    def opt(self, quick_opt):
        quick_opt['drtl']['weighting']['relation'] = 'predicted_transfer'
        del quick_opt['network_r']
        return quick_opt

    def test_is_known_before_the_first_step(self, build, opt):
        model = build(opt)
        feed(model, [0, 1])
        assert model.graph is not None
        assert model.weights.std() > 0.1

    @pytest.mark.parametrize(
        ('network', 'weights', 'message'),
        [
            ('TransferRelationNet', None, "^network_r: relation 'predicted_transfer' has a trained DRN of its own"),
            (None, 'net_r.pth', '^network_r: .* give both'),
            ('DistortionRelationNet', 'net_r.pth', r'^network_r\.type: .* needs a DRN that predicts gains'),
        ],
    )
    def test_another_drn_must_be_trained_and_predict(self, build, opt, network, weights, message):
        opt['network_r'] = network and {'type': network}
        opt['path']['pretrain_network_r'] = weights
        with pytest.raises(OptionError, match=message):
            build(opt)

    def test_weights_of_another_one_are_used(self, build, opt, workdir):
        net = TransferRelationNet(num_member=1).eval()
        torch.save({'params': net.state_dict()}, workdir / 'net_r.pth')
        opt['network_r'] = {'type': 'TransferRelationNet', 'num_member': 1}
        opt['path']['pretrain_network_r'] = str(workdir / 'net_r.pth')
        assert torch.equal(parameters(build(opt).net_r), parameters(net))


def test_states_hold_nothing_of_a_device(build, quick_opt):
    model = build(quick_opt)
    feed(model, [0, 1])
    model.save(epoch=0, current_iter=1)
    state = torch.load(f'{model.opt["path"]["training_states"]}/1.state', weights_only=True)
    assert not [key for key in state if 'generator' in key]


@pytest.mark.parametrize('pipeline', ['pretrain', 'meta'])
def test_a_step_fetches_one_number_from_the_device(build, quick_opt, monkeypatch, pipeline):
    """Whether all of it is finite; losses stay on the device until they are printed."""
    quick_opt['drtl'].update(pipeline=pipeline, hooks=[])
    quick_opt['drtl']['weighting'].update(relation='uniform', mode='sampling')
    model = build(quick_opt)
    feed(model, [0, 1])
    # Gradient weights and Adam's count of its steps are on the host anyway.
    monkeypatch.setattr(drtl_model, 'effective_number', lambda weights: 1.0)
    monkeypatch.setattr(model.optimizer_g, 'step', lambda: None)
    model.optimize_parameters(1)  # draws the first graph
    with watch_fetches() as fetched:
        model.optimize_parameters(2)
        assert len(fetched) == 1
        model.get_current_log()
    assert len(fetched) > 1


def test_states_of_other_tasks_are_refused(build, quick_opt):
    model = build(quick_opt)
    feed(model, [0, 1])
    model.save(epoch=0, current_iter=1)
    state = torch.load(f'{model.opt["path"]["training_states"]}/1.state', weights_only=True)
    quick_opt['datasets']['train']['distortions'].reverse()
    with pytest.raises(OptionError, match='not the tasks of the run to resume'):
        build(quick_opt).resume_training(state)


def test_networks_are_saved_before_the_state_that_needs_them(build, quick_opt, monkeypatch):
    model = build(quick_opt)
    feed(model, [0, 1])
    saved = []
    monkeypatch.setattr(model, 'save_network', lambda net, label, *_, **__: saved.append(label))
    monkeypatch.setattr(model, 'save_training_state', lambda *_: saved.append('state'))
    model.save(epoch=0, current_iter=1)
    assert saved == ['net_g_adapted', 'net_r', 'net_g', 'state']


def test_a_model_may_be_saved_before_the_first_step(build, quick_opt, workdir):
    model = build(quick_opt)
    model.save(0, 0)
    names = {path.name for path in (workdir / 'experiments/drtl_x4/models').iterdir()}
    assert {'net_g_0.pth', 'net_g_adapted_0.pth'} <= names


def test_a_model_may_be_validated_before_the_first_step(build, quick_opt):
    model = build(quick_opt)
    section = model.opt['datasets']['val']
    loader = build_dataloader(build_dataset(section), section, num_gpu=0, dist=False, seed=0)
    model.validation(loader, 0, None, False)
    assert {name.rpartition('_')[2] for name in model.validation_results} >= {'bicubic', 'adapted'}


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
            feed(model, [0, 1])
            model.optimize_parameters(step)
        models[1].adapt_to_target()
    assert torch.equal(parameters(models[0].net_g), parameters(models[1].net_g))


def test_log_holds_plain_numbers(build, quick_opt):
    model = build(quick_opt)
    feed(model, [0, 1])
    model.optimize_parameters(1)
    log = model.get_current_log()
    assert isinstance(log, OrderedDict)
    assert all(isinstance(value, float) for value in log.values())
    assert 1 <= log['effective_tasks'] <= 4


def test_shipped_rrdb_options_differ_in_network_name_schedule_and_adaptation_only():

    edsr, rrdb = (load_option_file(str(OPTIONS / f'{name}.yml')) for name in ('drtl_x4', 'drtl_rrdb_x4'))
    assert rrdb['network_g']['type'] == 'RRDBNet'
    for opt in (edsr, rrdb):
        for key in ('network_g', 'name'):
            del opt[key]
        for section, key in (
            ('train', 'total_iter'), ('train', 'scheduler'), ('val', 'val_freq'), ('logger', 'save_checkpoint_freq')
        ):  # fmt: skip
            del opt[section][key]
        del opt['train']['optim_g']['lr'], opt['drtl']['adapt']
    assert edsr == rrdb
