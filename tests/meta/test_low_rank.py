import copy

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from torch import nn

from drtl_plugin.errors import OptionError
from drtl_plugin.meta.adaptation import adaptation, last
from drtl_plugin.meta.low_rank import add_low_rank, merge_low_rank


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.GELU(), nn.Conv2d(6, 8, 1), nn.Flatten(2), nn.Linear(36, 5)
    ).double()


def test_adapters_change_nothing_at_first():
    net, x = network(), torch.rand(2, 4, 8, 8, dtype=torch.float64)
    before = net(x)
    add_low_rank(net, 2)
    assert torch.equal(net(x), before)


def test_only_adapters_learn():
    net = network()
    names = [name for name, _ in net.named_parameters()]
    add_low_rank(net, 2)
    learned = {name for name, p in net.named_parameters() if p.requires_grad}
    assert len(learned) == 2 * 3
    assert not learned & set(names)


@pytest.mark.parametrize('rank', [1, 3])
def test_merging_keeps_the_output_and_the_keys(rank):
    net, x = network(), torch.rand(2, 4, 8, 8, dtype=torch.float64)
    start = copy.deepcopy(net.state_dict())
    add_low_rank(net, rank)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p))
    adapted = net(x)
    merge_low_rank(net)
    assert torch.allclose(net(x), adapted, rtol=1e-12)
    assert net.state_dict().keys() == start.keys()
    for name, weight in net.state_dict().items():
        change = weight - start[name]
        if name.endswith('weight'):
            assert torch.linalg.matrix_rank(change.flatten(1)) == rank
        else:
            assert torch.equal(change, torch.zeros_like(change))


def test_adaptation_with_adapters_is_descent_in_them():
    """The merged weights are W + B A after Adam's own steps on A and B, worked out by hand."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2, bias=False).double()
    x, gt = torch.rand(4, 3, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    adapted = last(adaptation(net, nn.MSELoss(), [(x, gt)] * 3, lr=0.1, rank=1))
    probe = copy.deepcopy(net)
    add_low_rank(probe, 1)
    update = probe.parametrizations.weight[0]
    up, down = (p.detach().clone().requires_grad_() for p in (update.up, update.down))
    optimizer = torch.optim.Adam([down, up], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(x @ (net.weight.detach() + up @ down).T, gt).backward()
        optimizer.step()
    assert torch.allclose(adapted.weight, net.weight + up @ down, rtol=1e-10)


def test_networks_without_layers_for_them_are_refused():
    with pytest.raises(OptionError, match=r'drtl.adapt.rank: .* no Conv2d or Linear'):
        add_low_rank(nn.ConvTranspose2d(3, 3, 2), 1)


def test_networks_of_basicsr_take_them():
    net = EDSR(3, 3, num_feat=8, num_block=1, upscale=2, res_scale=1)
    pair = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 16, 16)
    adapted = last(adaptation(net, nn.L1Loss(), [pair] * 2, lr=1e-2, ema_decay=0.9, rank=2))
    assert adapted.state_dict().keys() == net.state_dict().keys()
    assert not torch.equal(adapted.conv_first.weight, net.conv_first.weight)
    assert torch.equal(adapted.conv_first.bias, net.conv_first.bias)
