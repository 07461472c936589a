"""The Distortion Relation Network (DRN) with its memory bank of prior knowledge."""

from __future__ import annotations

import math

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

# Residuals between a picture and its reduced ground truth are of a few grey levels in some tasks, of many in others;
# asinh(gain · residual) brings both to order one.
_RESIDUAL_GAIN = 60.0


class MemoryBank(nn.Module):
    """Prior knowledge about distortions in learnable slots, read by attention.

    ``a = softmax(q Mᵀ / √d)``, ``v = a M`` (arXiv 2111.13078, distortion relation network). A distortion that was never
    seen is expressed in what the auxiliary tasks taught.

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

    The encoder sees the picture and its residual to the reduced ground truth. (A network that sees the picture alone
    has to tell a blurred edge from a soft one.) The mean and the log of the spread of its features over the patch
    make the query to the memory bank, so that patches of any size embed alike. Both are normalised over the batch:
    noise would drown every other trait otherwise.

    Args:
        num_in_ch (int): Channels of the images. Default: 3.
        num_feat (int): Channels of intermediate features. Default: 32.
        num_embed (int): d, length of an embedding. Default: 32.
        num_slot (int): m, slots of the memory bank. Default: 32.
    """

    def __init__(self, num_in_ch: int = 3, num_feat: int = 32, num_embed: int = 32, num_slot: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(2 * num_in_ch, num_feat, 3, 1, 1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(num_feat, num_feat, 3, 1, 1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(num_feat, 2 * num_feat, 3, 2, 1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(2 * num_feat, 2 * num_feat, 3, 1, 1),
        )
        self.to_query = nn.Sequential(
            nn.BatchNorm1d(4 * num_feat),
            nn.Linear(4 * num_feat, 2 * num_feat),
            nn.LeakyReLU(0.1),
            nn.Linear(2 * num_feat, num_embed),
            nn.BatchNorm1d(num_embed, affine=False),
        )
        self.memory_bank = MemoryBank(num_slot, num_embed)

    def forward(self, lq: Tensor, reduced_gt: Tensor) -> Tensor:
        """Embed patches.

        Args:
            lq (Tensor): ``(B, C, h, w)`` in [0, 1].
            reduced_gt (Tensor): Ground truth on the grid of ``lq``, ``(B, C, h, w)`` in [0, 1].

        Returns:
            Tensor: ``(B, num_embed)``.
        """
        residual = torch.asinh(_RESIDUAL_GAIN * (lq - reduced_gt)) / 2
        features = self.encoder(torch.cat([lq - 0.5, residual], dim=1))
        std, mean = torch.std_mean(features, dim=(2, 3))
        return self.memory_bank(self.to_query(torch.cat([mean, torch.log(std + 1e-3)], dim=1)))
