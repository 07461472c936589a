import torch
from basicsr.archs import build_network

from drtl_plugin.archs.drn_arch import MemoryBank


def test_is_built_from_options():
    net = build_network({'type': 'DistortionRelationNet', 'num_feat': 8, 'num_embed': 16, 'num_slot': 5})
    assert net.memory_bank.slots.shape == (5, 16)


def test_memory_bank_is_scaled_dot_product_attention():
    bank = MemoryBank(num_slot=6, num_embed=8)
    query = torch.randn(3, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query[None], bank.slots[None], bank.slots[None])[0]
    assert torch.allclose(bank(query), expected, atol=1e-6)


def test_the_pair_matters_not_the_picture_alone():
    net = build_network({'type': 'DistortionRelationNet'}).eval()
    lq = torch.rand(1, 3, 16, 16)
    assert not torch.allclose(net(lq, lq), net(lq, torch.rand(1, 3, 16, 16)))
