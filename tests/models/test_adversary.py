"""GAN steps against BasicSR's own models, and in adaptation."""

import copy

import pytest
import torch
from basicsr.utils.misc import check_resume

from drtl_plugin import preflight
from drtl_plugin.errors import OptionError
from drtl_plugin.options.parse import parse_options
from drtl_plugin.runtime.trained_network import load_trained
from tests.models.helpers import feed, parameters
from tests.options.test_parse import arguments

GENERATOR = {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'num_grow_ch': 4}
UNET = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}
VGG_STYLE = {'type': 'VGGStyleDiscriminator', 'num_in_ch': 3, 'num_feat': 2}


@pytest.fixture
def gan_opt(quick_opt) -> dict:
    quick_opt['network_g'], quick_opt['network_d'] = dict(GENERATOR), dict(UNET)
    quick_opt['drtl'].update(pipeline='pretrain', hooks=[])
    quick_opt['drtl']['weighting'].update(relation='uniform')
    quick_opt['train'].update(
        optim_d={'type': 'Adam', 'lr': 1e-3, 'betas': [0.9, 0.99]},
        gan_opt={'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': 0.1},
    )
    return quick_opt


def state(net: torch.nn.Module) -> dict:
    return {name: weight.clone() for name, weight in net.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    'model_type, network_d, train',
    [
        ('SRGANModel', UNET, {}),
        ('ESRGANModel', UNET, {'relativistic': True}),
        ('ESRGANModel', VGG_STYLE, {'relativistic': True}),
        ('SRGANModel', UNET, {'net_d_iters': 2, 'net_d_init_iters': 1}),
    ],
)
def test_uniform_pretraining_is_that_of_basicsr_step_for_step(build, gan_opt, model_type, network_d, train):
    gan_opt['network_d'] = dict(network_d)
    gan_opt['train'].update(train)
    if network_d is VGG_STYLE:
        gan_opt['datasets']['train']['gt_size'] = 128
    ours = build(gan_opt)
    theirs_opt = {**copy.deepcopy(gan_opt), 'model_type': model_type}
    theirs_opt['train'].pop('relativistic', None)
    theirs = build(theirs_opt)
    for name in ('net_g', 'net_g_ema', 'net_d'):
        getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    start = state(ours.net_g)
    for step in range(1, 5):
        feed(ours, [0, 1])
        theirs.feed_data({'lq': ours.batch.lq.flatten(0, 1), 'gt': ours.batch.gt.flatten(0, 1)})
        for model in (ours, theirs):
            model.update_learning_rate(step)
            model.optimize_parameters(step)
        for name in ('net_g', 'net_g_ema', 'net_d'):
            assert same(state(getattr(ours, name)), state(getattr(theirs, name))), (name, step)
        logs = [model.get_current_log() for model in (ours, theirs)]
        for name in ('l_g_gan', 'l_d_real', 'l_d_fake', 'out_d_real', 'out_d_fake'):
            assert logs[0].get(name) == logs[1].get(name)
    assert not same(start, state(ours.net_g))


def test_a_resumed_run_has_its_discriminator(build, gan_opt, workdir):
    model = build(gan_opt)

    def steps(model, first, last):
        for step in range(first, last + 1):
            feed(model, [0, 1])
            model.optimize_parameters(step)

    steps(model, 1, 2)
    model.save(epoch=0, current_iter=2)
    steps(model, 3, 4)
    opt = copy.deepcopy(gan_opt)
    root = workdir / 'experiments/drtl_x4'
    opt['path'].update(resume_state=str(root / 'training_states/2.state'))
    parsed = {**opt, 'path': {**opt['path'], 'models': str(root / 'models')}}
    check_resume(parsed, 2)
    opt['path'].update({key: value for key, value in parsed['path'].items() if key.startswith('pretrain_network_')})
    resumed = build(opt)
    resumed.resume_training(torch.load(root / 'training_states/2.state', weights_only=True))
    steps(resumed, 3, 4)
    for name in ('net_g', 'net_g_ema', 'net_d'):
        assert same(state(getattr(resumed, name)), state(getattr(model, name))), name
    plain = copy.deepcopy(gan_opt)
    plain['network_d'] = plain['train']['gan_opt'] = None
    with pytest.raises(OptionError, match=r'^network_d: a resumed run must have a discriminator exactly if'):
        build(plain).resume_training(torch.load(root / 'training_states/2.state', weights_only=True))


def test_adaptation_trains_a_discriminator_of_its_own(build, gan_opt):
    """What adapts is what a step of SRGANModel would make of the same batch; the model's own networks stay."""
    gan_opt['drtl']['adapt'].update(steps=3, ema_decay=0, warmup=0, lr=1e-3)
    gan_opt['train']['ema_decay'] = 0
    gan_opt['train']['optim_g'] = {'type': 'Adam', 'lr': 1e-3}
    ours = build(gan_opt)
    theirs = build({**copy.deepcopy(gan_opt), 'model_type': 'SRGANModel'})
    for name in ('net_g', 'net_d'):
        getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    before = {name: state(getattr(ours, name)) for name in ('net_g', 'net_d')}
    generator = torch.get_rng_state()
    batches = []
    ours.prepare()
    patches, first = ours.episodes.target_patches, ours.net_d(torch.zeros(1, 3, 64, 64))  # leaves tensors with a graph
    assert first.requires_grad
    before['net_d'] = state(ours.net_d)
    theirs.net_d.load_state_dict(ours.net_d.state_dict())
    ours.episodes.target_patches = lambda *args: batches.append(patches(*args)) or batches[-1]
    ours.adapt_to_target()
    assert len(batches) == 3
    for step, (lq, gt) in enumerate(batches, 1):
        theirs.feed_data({'lq': lq, 'gt': gt})
        theirs.optimize_parameters(step)
    assert same(state(ours.net_g_adapted), state(theirs.net_g))
    assert all(same(before[name], state(getattr(ours, name))) for name in before)
    assert torch.equal(torch.get_rng_state(), generator)
    adapted = state(ours.net_g_adapted)
    ours.episodes.target_patches = patches
    ours.adapt_to_target()
    assert same(state(ours.net_g_adapted), adapted)


def test_initial_weights_are_a_function_of_the_seed(build, gan_opt):
    first = build(gan_opt)
    torch.rand(3)
    second = build(gan_opt)
    assert torch.equal(parameters(first.net_d), parameters(second.net_d))
    assert first.net_d.training


@pytest.mark.parametrize(
    'change, message',
    [
        ({'drtl': {'pipeline': 'meta'}}, r'^network_d: pipeline: meta has no GAN steps; use drtl\.pipeline'),
        ({'network_d': None}, r'^network_d is missing: train\.gan_opt needs a discriminator'),
        ({'train': {'gan_opt': None}}, r'^train\.gan_opt is missing: network_d needs it'),
        ({'train': {'optim_d': None}}, r'^train\.optim_d is missing: network_d needs it'),
        ({'train': {'pixel_opt': None}}, r'^train: pixel_opt or perceptual_opt is missing'),
        (
            {'network_d': VGG_STYLE},
            r'^datasets\.train\.gt_size: the losses cannot take patches of 64 pixels a side \(Input size must be id',
        ),
        ({'datasets': {'train': {'gt_size': 84}}}, r'^datasets\.train\.gt_size: the losses cannot take patches of 84'),
        (
            {'train': {'perceptual_opt': {'type': 'PerceptualLoss', 'layer_weights': {'conv5_4': 1}}}},
            r'^train\.perceptual_opt: PerceptualLoss would download its VGG weights; use type: VGGPerceptualLoss',
        ),
        (
            {'train': {'perceptual_opt': {'type': 'VGGPerceptualLoss', 'vgg_weights': 'none.pth'}}},
            r'^train\.perceptual_opt\.vgg_weights: none\.pth cannot be read \(No such file',
        ),
        ({'network_d': {**UNET, 'num_feats': 4}}, r"^network_d: unknown argument of UNetDiscriminatorSN 'num_feats'"),
    ],
)
def test_what_does_not_go_together_is_refused(workdir, write_opt, gan_opt, monkeypatch, change, message):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(workdir / 'hub'))

    def merge(into, other):
        for key, value in other.items():
            if isinstance(value, dict) and key in ('drtl', 'train', 'datasets'):
                merge(into[key], value)
            else:
                into[key] = value

    merge(gan_opt, change)
    with pytest.raises(OptionError if 'none.pth' not in str(change) else Exception, match=message):
        preflight.check(parse_options(arguments(write_opt(gan_opt)), str(workdir), is_train=True))


def test_checkpoints_record_their_losses(build, gan_opt, workdir):
    model = build(gan_opt)
    model.save_network(model.net_g, 'net_g', 1)
    path = workdir / 'experiments/drtl_x4/models/net_g_1.pth'
    assert load_trained(str(path)).losses == ('gan', 'pixel') and load_trained(str(path)).may_be_of_gan
    plain = copy.deepcopy(gan_opt)
    plain['network_d'] = plain['train']['gan_opt'] = None
    plain['path']['pretrain_network_g'] = str(path)
    model = build(plain)
    model.save_network(model.net_g, 'net_g', 2)
    assert load_trained(str(path.with_name('net_g_2.pth'))).losses == ('gan', 'pixel')  # it began with them
    content = torch.load(path, weights_only=True)
    del content['losses']
    torch.save(content, path)
    model = build(plain)
    model.save_network(model.net_g, 'net_g', 3)
    assert load_trained(str(path.with_name('net_g_3.pth'))).losses is None
    plain['path']['pretrain_network_g'] = None
    model = build(plain)
    model.save_network(model.net_g, 'net_g', 4)
    assert not load_trained(str(path.with_name('net_g_4.pth'))).may_be_of_gan
