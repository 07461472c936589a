"""What only a GPU can show: ``make test-gpu``. Skipped where there is none, as in CI, or where it is hidden."""

import copy

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.archs.swinir_arch import SwinTransformerBlock
from peers import PEERS
from skimage import data
from torch import nn

from drtl_plugin import cli
from drtl_plugin.api.upscale import upscale
from drtl_plugin.runtime.trained_network import TrainedNetwork
from tests.meta.test_learner_peers import LR, episode, ours
from tests.models import test_drtl_model as model_tests
from tests.models.helpers import feed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
# Draws from the GPU's shared generator and records the numbers.
_DICE_HOOK = """
import torch
from drtl_plugin.hooks import META_HOOK_REGISTRY, MetaTrainerHook

@META_HOOK_REGISTRY.register()
class GPUDiceHook(MetaTrainerHook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        with open('dice.txt', 'a') as file:
            print(batch_idx, torch.rand((), device='cuda').item(), file=file)
"""


def weights_of(workdir, name: str) -> dict[str, torch.Tensor]:
    path = workdir / 'experiments/drtl_x4/models' / name
    return torch.load(path, weights_only=True)['params']


@pytest.mark.parametrize('peer', PEERS.values(), ids=PEERS)
@pytest.mark.parametrize('algorithm', ['maml', 'fomaml'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_outer_gradients_are_those_of_other_libraries(peer, algorithm, dtype, tolerance):
    net, support, query = episode(dtype)
    net, net.mean = net.cuda(), net.mean.cuda()
    support, query = ([image.cuda() for image in pair] for pair in (support, query))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        expected = peer(copy.deepcopy(net), nn.MSELoss(), support, query, LR, 3, algorithm)
        result = ours(net, support, query, 3, algorithm)
    for gradient, other in zip(result, expected, strict=True):
        assert (gradient - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize('num_gpu', [0, 1, 'auto', 2])
def test_networks_are_where_num_gpu_says(build, quick_opt, num_gpu):
    quick_opt['num_gpu'] = num_gpu
    model = build(quick_opt)
    feed(model, [0, 1])
    model.optimize_parameters(1)
    expected = 'cuda' if num_gpu else 'cpu'
    assert model.batch.lq.device.type == expected
    assert {p.device.type for p in model.net_g.parameters()} == {expected}
    assert all(np.isfinite(value) for value in model.get_current_log().values())


def test_uniform_pretraining_is_srmodel_step_for_step(build, quick_opt):
    """As on the CPU, if cuDNN uses deterministic kernels only; the called test has the assertions."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True, deterministic=True):
        for mode in ('sampling', 'gradient'):
            model_tests.test_uniform_pretraining_is_srmodel_step_for_step(build, copy.deepcopy(quick_opt), mode)


@pytest.mark.parametrize('pipeline', ['meta', 'pretrain'])
def test_bfloat16_is_computed_in(build, quick_opt, pipeline):
    quick_opt['drtl']['pipeline'] = pipeline
    quick_opt['train']['amp'] = 'bf16'
    model = build(quick_opt)
    assert model.amp
    assert model.memory_format == torch.channels_last
    feed(model, [0, 1])
    seen = []
    model.net_g.conv_last.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = copy.deepcopy(model.net_g.state_dict())
    model.optimize_parameters(1)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.net_g.parameters()} == {torch.float32}
    assert any(not torch.equal(value, before[name]) for name, value in model.net_g.state_dict().items())


@pytest.mark.parametrize('pipeline', ['meta', 'pretrain'])
def test_compiled_steps_are_those_of_eager_ones(build, quick_opt, pipeline):
    quick_opt['drtl']['pipeline'] = pipeline
    results = []
    for compiled in (False, True):
        quick_opt['train']['compile'] = compiled
        torch.manual_seed(0)
        model = build(quick_opt)
        model.hooks = []
        feed(model, [0, 1])
        model.optimize_parameters(1)
        results.append([p.grad for p in model.net_g.parameters()])
    for gradient, other in zip(*results, strict=True):
        assert (gradient - other).norm() <= 1e-2 * other.norm()  # convolutions are in TF32


def test_prefetching_onto_the_gpu_trains_alike(workdir, quick_opt, write_opt, monkeypatch):
    weights = []
    for mode in ('cpu', 'cuda'):
        folder = workdir / mode
        folder.mkdir()
        (folder / 'datasets').symlink_to(workdir / 'datasets')
        monkeypatch.chdir(folder)
        quick_opt['datasets']['train'].update(prefetch_mode=mode, pin_memory=mode == 'cuda', num_worker_per_gpu=1)
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        weights.append(weights_of(folder, 'net_g_latest.pth'))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-2, atol=2e-3)  # two steps of Adam at 1e-3


def test_a_resumed_run_goes_on_with_the_draws_of_the_gpu(workdir, quick_opt, write_opt):
    (workdir / 'dice.py').write_text(_DICE_HOOK)
    quick_opt['train']['total_iter'] = 4
    quick_opt['logger']['save_checkpoint_freq'] = 2
    quick_opt['drtl']['hooks'] += [{'type': 'GPUDiceHook'}]
    command = ['train', '-opt', write_opt(quick_opt), '--import', 'dice']
    assert cli.main(command) == 0
    whole = (workdir / 'dice.txt').read_text().splitlines()
    root = workdir / 'experiments/drtl_x4'
    for file in [*root.glob('*/*_4.pth'), root / 'training_states/4.state']:
        file.unlink()
    torch.cuda.manual_seed_all(1234)
    assert cli.main([*command, '--auto_resume']) == 0
    assert (workdir / 'dice.txt').read_text().splitlines()[4:] == whole[2:]


def test_a_state_of_the_gpu_resumes_on_the_cpu_and_back(workdir, quick_opt, write_opt):
    quick_opt['logger']['save_checkpoint_freq'] = 2
    for total, num_gpu in ((2, 1), (4, 0), (6, 1)):
        quick_opt['num_gpu'] = num_gpu
        quick_opt['train']['total_iter'] = total
        assert cli.main(['train', '-opt', write_opt(quick_opt), '--auto_resume']) == 0
        weights = weights_of(workdir, f'net_g_{total}.pth')
        assert all(value.device.type == 'cpu' and value.isfinite().all() for value in weights.values())


def test_half_precision_upscales_as_single(tmp_path):
    options = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}
    torch.manual_seed(0)
    network = TrainedNetwork(build_network(dict(options)).eval(), options, 2)
    cv2.imwrite(str(tmp_path / 'a.png'), data.coffee()[:200, :300])
    for name, full in (('half', False), ('full', True)):
        _, failed = upscale(network, str(tmp_path / 'a.png'), str(tmp_path / name), full_precision=full)
        assert not failed
    half, full = (cv2.imread(str(tmp_path / name / 'a.png')).astype(int) for name in ('half', 'full'))
    assert np.abs(half - full).max() <= 3
    assert next(network.net.parameters()).dtype == torch.float32


def test_masks_of_swinir_are_made_on_the_gpu():
    block = SwinTransformerBlock(8, (16, 16), 2, window_size=8, shift_size=4).cuda()
    mask = block.calculate_mask((24, 32))
    assert mask.device.type == 'cuda'
    assert torch.equal(mask.cpu(), block.cpu().calculate_mask((24, 32)))
