"""The Distortion Relation Network (DRN): an encoder of LQ/GT pairs with a memory bank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

# RGB to Y, Cb, Cr (ITU-R BT.601) in grey levels: blur and compression differ between luma and chroma.
_YCBCR = ((76.245, 149.685, 29.07), (-43.095, -84.405, 127.5), (127.5, -106.845, -20.655))
# Added to powers: that of noise with a sigma of about 0.7 grey levels.
_FLOOR = 0.5


class PairSpectrum(nn.Module):
    """The effect of a distortion by frequency, largely independent of the content (ours).

    Features are averages over all windows of a patch, with the spectra X of the reduced GT and Y of the LQ patch
    (Welch's method; Bendat and Piersol, *Random Data*, chapter 6):

    - gain ``|⟨Y X*⟩| / ⟨|X|²⟩``: blur, sharpening, chroma subsampling. The modulus ignores small shifts between the two
      images, which real pairs have;
    - residual ``⟨|Y - ⟨Y X*⟩ X / ⟨|X|²⟩|²⟩``: noise and compression, which no filter explains;
    - power ``⟨|X|²⟩``: how reliable the other two are;
    - ratio of the residuals of bright and dark windows: shot noise.

    All are logarithms, for luma and chroma.

    Args:
        window (int): Side of the Hann windows in pixels, even; windows overlap by half.

    Raises:
        ValueError: For a window that is odd or below 4.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        if window < 4 or window % 2:
            raise ValueError(f'window must be even and at least 4, got {window}.')
        self.window = window
        self.taper: Tensor
        self.ycbcr: Tensor
        taper = torch.outer(*[torch.hann_window(window)] * 2)
        self.register_buffer('taper', taper / taper.norm(), persistent=False)
        self.register_buffer('ycbcr', torch.tensor(_YCBCR), persistent=False)
        self.num_out = 3 * (3 * window * (window // 2 + 1) + 1)

    def _windows(self, img: Tensor) -> Tensor:
        """``(B, C, h, w)`` to ``(B, C, windows, window, window)``."""
        columns = F.unfold(img, self.window, stride=self.window // 2)
        return columns.unflatten(1, (img.shape[1], self.window, self.window)).permute(0, 1, 4, 2, 3)

    def _spectra(self, windows: Tensor) -> Tensor:
        mean = (windows * self.taper).sum(dim=(-2, -1), keepdim=True) / self.taper.sum()
        return torch.fft.rfft2((windows - mean) * self.taper)

    def forward(self, lq: Tensor, reduced_gt: Tensor) -> Tensor:
        """Features ``(B, num_out)`` of LQ and reduced GT, ``(B, 3, h, w)`` each, RGB in [0, 1]."""
        x, y = (self._windows(torch.einsum('ij,bjhw->bihw', self.ycbcr, img)) for img in (reduced_gt, lq))
        brightness = x[:, :1].mean(dim=(-2, -1), keepdim=True) / 255
        x, y = self._spectra(x), self._spectra(y)
        power = x.abs().square().mean(dim=2)
        cross = (y * x.conj()).mean(dim=2)
        filtered = (cross / (power + 1e-3)).unsqueeze(2) * x
        residual = (y - filtered).abs().square()
        bright = (residual * brightness).sum(dim=2) / (brightness.sum(dim=2) + 0.1)
        dark = (residual * (1 - brightness)).sum(dim=2) / ((1 - brightness).sum(dim=2) + 0.1)
        ratio = (bright.sum(dim=(-2, -1)) + _FLOOR).log() - (dark.sum(dim=(-2, -1)) + _FLOOR).log()
        gain = (cross.abs() + _FLOOR).log() - (power + _FLOOR).log()
        levels = [gain, (residual.mean(dim=2) + _FLOOR / 2).log(), (power + _FLOOR).log()]
        return torch.cat([level.flatten(1) for level in [*levels, ratio]], dim=1)


class MemoryBank(nn.Module):
    """Learnable slots, read by attention: an unseen distortion becomes a mixture of known ones.

    ``a = softmax(q Mᵀ / √d)``, ``v = a M``. The paper (arXiv 2111.13078) names a memory bank; the formula is our
    reconstruction.

    Args:
        num_slot (int): m, number of slots.
        num_embed (int): d, length of slots and embeddings.
    """

    def __init__(self, num_slot: int, num_embed: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(num_slot, num_embed))

    def forward(self, query: Tensor) -> Tensor:
        """Read the bank.

        Args:
            query (Tensor): ``(B, d)``.

        Returns:
            Tensor: Embeddings ``(B, d)``, convex combinations of the slots.
        """
        attention = torch.softmax(query @ self.slots.T / math.sqrt(self.slots.shape[1]), dim=1)
        return attention @ self.slots


@ARCH_REGISTRY.register()
class DistortionRelationNet(nn.Module):
    """Maps an LQ patch and its reduced GT to a distortion embedding.

    The paper (arXiv 2111.13078) names the network; the encoder is ours: two layers turn the spectra of the pair
    (:class:`PairSpectrum`) into a query of the memory bank. Convolutions on LQ patches alone recognise content rather
    than distortions (``benchmarks/relation_recovery.py`` compares them).

    Args:
        window (int): Side of the spectral windows in LQ pixels, even. Default: 8.
        num_feat (int): Hidden units of the encoder. Default: 128.
        num_embed (int): d, length of an embedding. Default: 32.
        num_slot (int): m, number of slots of the memory bank. Default: 32.
    """

    def __init__(self, window: int = 8, num_feat: int = 128, num_embed: int = 32, num_slot: int = 32) -> None:
        super().__init__()
        self.window = window
        spectrum = PairSpectrum(window)
        self.encoder = nn.Sequential(
            nn.BatchNorm1d(spectrum.num_out),
            nn.Linear(spectrum.num_out, num_feat),
            nn.LeakyReLU(0.1),
            nn.Linear(num_feat, num_embed),
            nn.BatchNorm1d(num_embed, affine=False),
        )
        self.spectrum = spectrum
        self.memory_bank = MemoryBank(num_slot, num_embed)

    def forward(self, lq: Tensor, reduced_gt: Tensor) -> Tensor:
        """Embed patches.

        Args:
            lq (Tensor): RGB, ``(B, 3, h, w)`` in [0, 1]; h and w are at least ``window``.
            reduced_gt (Tensor): GT reduced to the size of ``lq``, ``(B, 3, h, w)`` in [0, 1].

        Returns:
            Tensor: ``(B, num_embed)``.
        """
        return self.embed(self.spectrum(lq, reduced_gt))

    def embed(self, features: Tensor) -> Tensor:
        """Embeddings ``(B, num_embed)`` of the spectrum's features ``(B, spectrum.num_out)``."""
        return self.memory_bank(self.encoder(features))


class TransferMember(DistortionRelationNet):
    """A DRN with a query and a key: one member of :class:`TransferRelationNet`."""

    def __init__(self, window: int, num_feat: int, num_embed: int, num_slot: int, num_relation: int) -> None:
        super().__init__(window, num_feat, num_embed, num_slot)
        self.query = nn.Linear(num_embed, num_relation, bias=False)
        self.key = nn.Linear(num_embed, num_relation, bias=False)
        self.usefulness = nn.Linear(num_embed, 1, bias=False)

    def gains(self, auxiliary: Tensor, target: Tensor) -> Tensor:
        """See :meth:`TransferRelationNet.gains`."""
        keys = self.key(auxiliary)
        gains = keys @ self.query(target).T / math.sqrt(keys.shape[1]) + self.usefulness(auxiliary)
        return gains - gains.mean(dim=0)


@ARCH_REGISTRY.register()
class TransferRelationNet(nn.Module):
    """A DRN that predicts transfer: how much learning one task helps to restore another.

    Transfer is not symmetric, so a query of the target's embedding is compared with a key of the auxiliary task's. The
    relation is ours; encoder and memory bank are those of :class:`DistortionRelationNet`. Members that start from
    different weights predict differently, so their predictions are averaged.

    Args:
        window (int), num_feat (int), num_embed (int), num_slot (int): See :class:`DistortionRelationNet`.
        num_relation (int): Length of queries and keys. Default: 8.
        num_member (int): Number of members. Default: 5.

    Example::

        net = TransferRelationNet().eval()
        auxiliary = torch.stack([net(lq, reduced_gt).mean(dim=0) for lq, reduced_gt in tasks])
        target = net(target_lq, target_reduced_gt).mean(dim=0)
        relation = net.gains(auxiliary, target[None])[:, 0]
    """

    def __init__(
        self,
        window: int = 8,
        num_feat: int = 64,
        num_embed: int = 32,
        num_slot: int = 32,
        num_relation: int = 8,
        num_member: int = 5,
    ) -> None:
        super().__init__()
        self.window = window
        members = [TransferMember(window, num_feat, num_embed, num_slot, num_relation) for _ in range(num_member)]
        self.members: Sequence[TransferMember] = nn.ModuleList(members)  # type: ignore[assignment]

    def forward(self, lq: Tensor, reduced_gt: Tensor) -> Tensor:
        """Embed patches; see :meth:`DistortionRelationNet.forward`.

        Returns:
            Tensor: The members' embeddings one after the other, ``(B, num_member * num_embed)``.
        """
        features = self.members[0].spectrum(lq, reduced_gt)
        return torch.cat([member.embed(features) for member in self.members], dim=1)

    def gains(self, auxiliary: Tensor, target: Tensor) -> Tensor:
        """Predicted gains ``q(v_j)·k(v_i)/√d + b(v_i)`` of task i on target j, centred over i, mean of the members.

        Args:
            auxiliary (Tensor): Embeddings of N auxiliary tasks, ``(N, num_member * num_embed)``.
            target (Tensor): Embeddings of M targets, ``(M, num_member * num_embed)``.

        Returns:
            Tensor: ``(N, M)``, differences of the logarithm of a loss: 0.1 means a loss that is about 10 % lower.
        """
        parts = zip(
            self.members,
            auxiliary.chunk(len(self.members), dim=1),
            target.chunk(len(self.members), dim=1),
            strict=True,
        )
        return torch.stack([member.gains(*embeddings) for member, *embeddings in parts]).mean(dim=0)
