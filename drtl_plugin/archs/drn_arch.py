"""The Distortion Relation Network (DRN): an encoder of pairs, and its memory bank of prior knowledge."""

from __future__ import annotations

import math

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

# RGB to Y, Cb, Cr (ITU-R BT.601), in grey levels: lenses blur and cameras compress luma and chroma differently.
_YCBCR = ((76.245, 149.685, 29.07), (-43.095, -84.405, 127.5), (127.5, -106.845, -20.655))
# Power below which nothing is seen: that of a noise of about 0.7 grey levels.
_FLOOR = 0.5


class PairSpectrum(nn.Module):
    """What a distortion does to a picture, frequency by frequency, with the content divided out.

    Over all windows of a patch, with the spectra X of the reduced ground truth and Y of the low-quality picture,
    (Welch's method; Bendat and Piersol, *Random Data*, chapter 6)

    - gain ``|⟨Y X*⟩| / ⟨|X|²⟩``: blur, sharpening, chroma subsampling. Its modulus is blind to a small shift between
      the two pictures, which real pairs have;
    - residual ``⟨|Y - ⟨Y X*⟩ X / ⟨|X|²⟩|²⟩``: noise and compression, what no filter explains;
    - ``⟨|X|²⟩``: how much content there was to tell by;
    - how the residual of bright windows compares with that of dark ones: shot noise.

    All are logarithms, for luma and chroma.

    Args:
        window (int): Side of the (Hann) windows in pixels, even; they overlap by half.

    Raises:
        ValueError: For a window that is odd or below 4.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        if window < 4 or window % 2:
            raise ValueError(f'window must be even and at least 4, got {window}.')
        self.window = window
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
        """``(B, 3, h, w)`` each, RGB in [0, 1], to ``(B, num_out)``."""
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
    """Prior knowledge about distortions in learnable slots, read by attention.

    ``a = softmax(q Mᵀ / √d)``, ``v = a M``. The paper (arXiv 2111.13078) names a memory bank; the formula is our
    reconstruction. An unseen distortion is expressed by those of the auxiliary tasks.

    Args:
        num_slot (int): m, number of slots.
        num_embed (int): d, length of a slot and of an embedding.
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
    """Maps a low-quality patch, beside its reduced ground truth, to a distortion embedding.

    The encoder looks at the pair's spectra (:class:`PairSpectrum`), from which two layers make the query to the
    memory bank. Convolutions on low-quality pictures alone tell content rather than distortion
    (``benchmarks/relation_recovery.py`` has them for comparison).

    Args:
        window (int): Side of the spectra's windows in pixels of the low-quality picture, even. Default: 8.
        num_feat (int): Hidden units of the encoder. Default: 128.
        num_embed (int): d, length of an embedding. Default: 32.
        num_slot (int): m, slots of the memory bank. Default: 32.
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
            reduced_gt (Tensor): Ground truth on the grid of ``lq``, ``(B, 3, h, w)`` in [0, 1].

        Returns:
            Tensor: ``(B, num_embed)``.
        """
        return self.memory_bank(self.encoder(self.spectrum(lq, reduced_gt)))
