import pytest
import torch
from basicsr.archs import build_network

from drtl_plugin.archs.drn_arch import MemoryBank, PairSpectrum


def test_is_built_from_options():
    net = build_network({'type': 'DistortionRelationNet', 'num_feat': 8, 'num_embed': 16, 'num_slot': 5})
    assert net.memory_bank.slots.shape == (5, 16)


def test_memory_bank_is_scaled_dot_product_attention():
    bank = MemoryBank(num_slot=6, num_embed=8)
    query = torch.randn(3, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query[None], bank.slots[None], bank.slots[None])[0]
    assert torch.allclose(bank(query), expected, atol=1e-6)


class TestTransferRelationNet:
    """The DRN that predicts transfer."""

    def gains(self, net, auxiliary, target) -> torch.Tensor:
        lq, gt = torch.rand(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        embeddings = net(lq, gt)
        return net.gains(embeddings[auxiliary], embeddings[target])

    def test_gains_are_centred_and_not_symmetric(self):
        net = build_network({'type': 'TransferRelationNet', 'num_feat': 8, 'num_member': 2}).eval()
        gains = self.gains(net, [0, 1, 2], [0, 1, 2])
        assert gains.mean(dim=0).abs().max() < 1e-5
        assert (gains - gains.T).abs().max() > 1e-3

    def test_members_are_averaged(self):
        net = build_network({'type': 'TransferRelationNet', 'num_feat': 8, 'num_member': 3}).eval()
        together = self.gains(net, [0, 1, 2], [3, 4])
        alone = [self.gains(member, [0, 1, 2], [3, 4]) for member in net.members]
        assert torch.allclose(together, sum(alone) / 3, atol=1e-6)


def test_embeddings_are_read_from_the_memory_bank():
    """A bank of one slot has one answer; the attention of two slots moves on the line between them."""
    torch.manual_seed(0)
    lq, gt = torch.rand(2, 5, 3, 16, 16)
    single, double = (build_network({'type': 'DistortionRelationNet', 'num_slot': num}).eval() for num in (1, 2))
    with torch.no_grad():
        assert torch.allclose(single(lq, gt), single.memory_bank.slots.expand(5, -1))
        first, second = double.memory_bank.slots
        way = second - first
        share = (double(lq, gt) - first) @ way / way.square().sum()
        assert torch.allclose(double(lq, gt), first + share[:, None] * way, atol=1e-5)
    assert share.min() > 0 and share.max() < 1


def test_the_pair_matters_not_the_picture_alone():
    net = build_network({'type': 'DistortionRelationNet'}).eval()
    lq = torch.rand(1, 3, 16, 16)
    assert not torch.allclose(net(lq, lq), net(lq, torch.rand(1, 3, 16, 16)))


class TestPairSpectrum:
    """Against what is known of a pair: its filter, its noise. Entries of levels are ``[gain | residual | power]``."""

    def levels(self, lq, gt) -> torch.Tensor:
        """``(B, [gain, residual, power], [Y, Cb, Cr], 8, 5)``."""
        return PairSpectrum(8)(lq, gt)[:, :-3].view(len(lq), 3, 3, 8, 5)

    def textures(self, generator) -> torch.Tensor:
        return 0.3 + 0.4 * torch.rand(4, 3, 64, 64, generator=generator)

    @pytest.mark.parametrize('window', [1, 2, 7])
    def test_windows_that_make_no_sense_are_refused(self, window):
        with pytest.raises(ValueError, match='window must be even and at least 4'):
            PairSpectrum(window)

    def test_gain_of_a_known_filter(self, generator):
        """A binomial filter along x has the transfer function cos²(ω/2)."""
        gt = self.textures(generator)
        lq = (gt.roll(1, -1) + 2 * gt + gt.roll(-1, -1)) / 4
        gain = self.levels(lq, gt)[:, 0].exp().mean(dim=(0, 1))
        omega = 2 * torch.pi * torch.arange(5) / 8
        # Away from the Nyquist frequency, where a filter of windows is not quite the windows of a filtered picture.
        assert torch.allclose(gain[1:4, :4], torch.cos(omega[:4] / 2).square().expand(3, 4), atol=0.06)

    def test_gain_is_blind_to_shifts_and_contents(self, generator):
        gt = self.textures(generator)
        gain = self.levels(gt.roll(1, -1), gt)[:, 0]
        assert gain[..., 1:].abs().max() < 0.45
        assert gain[..., 1:].abs().mean() < 0.15

    def test_residual_is_the_noise(self, generator):
        """White noise of 3 grey levels has the power 9 in luma's part, whatever the content."""
        gt = self.textures(generator)
        lq = gt + 3 / 255 * torch.randn(gt.shape, generator=generator)
        residual = self.levels(lq, gt)[:, 1, 0].exp().mean()
        luma = 9 * (0.299**2 + 0.587**2 + 0.114**2)
        assert residual == pytest.approx(luma + 0.25, rel=0.1)

    def test_power_is_that_of_the_content(self, generator):
        flat, textured = torch.full((1, 3, 32, 32), 0.5), self.textures(generator)
        assert self.levels(flat, flat)[:, 2].exp().max() == pytest.approx(0.5, rel=1e-3)  # the floor
        assert self.levels(textured, textured)[:, 2].exp().mean() > 100

    def test_brightness_of_the_noise_is_seen(self, generator):
        ramp = torch.linspace(0.1, 0.9, 64).expand(2, 3, 64, 64)
        noise = torch.randn(ramp.shape, generator=generator) * 0.02
        spectrum = PairSpectrum(8)
        shot, even = (spectrum(ramp + noise * shape, ramp)[:, -3:].mean() for shape in (2 * ramp, 1))
        assert shot > even + 0.5
        assert abs(even) < 0.2
