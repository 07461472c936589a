"""Episodes: the interface of a training set, and the batches that the model makes from its items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from drtl_plugin.tasks.library import DistortionLibrary


class PatchOptions(Protocol):
    """Options of a training set that the model reads.

    Attributes:
        gt_size (int): Side of the GT patches in pixels; a multiple of the library's scale.
        use_hflip, use_rot (bool): Whether patches of the target's pairs are flipped and rotated at random.
    """

    gt_size: int
    use_hflip: bool
    use_rot: bool


class EpisodeDataset(Protocol):
    """A dataset that ``DRTLModel`` can train on; ``DistortionTaskDataset`` is one.

    Register a class with these members in ``DATASET_REGISTRY`` and name it in ``datasets.train.type``. The model makes
    the LQ patches itself, on its device, and draws the task of each episode.

    Attributes:
        options (PatchOptions): Patch size and augmentation.
        library (DistortionLibrary): The auxiliary tasks.
        target_pairs (Sequence[tuple[Tensor, Tensor]] | None): Pairs ``(lq, gt)`` of the target camera in full, RGB,
            uint8, ``(3, H, W)`` and ``(3, s H, s W)``; None if there is no target.
    """

    options: PatchOptions
    library: DistortionLibrary
    target_pairs: Sequence[tuple[Tensor, Tensor]] | None

    def gt_patches(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw GT patches ``(num, 3, gt_size, gt_size)``, RGB in [0, 1], with a generator on the CPU."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An episode: ``index`` (int), and the patches ``support_gt`` ``(S, 3, gt_size, gt_size)`` and ``query_gt``."""

    def __len__(self) -> int:
        """The number of episodes."""


# Members that a training set needs in addition to the methods of every dataset.
_MEMBERS = ('options', 'library', 'target_pairs', 'gt_patches')


def missing_members(dataset: object) -> list[str]:
    """The members of :class:`EpisodeDataset` that a dataset lacks."""
    return [name for name in _MEMBERS if not hasattr(dataset, name)]


@dataclass(frozen=True, eq=False)
class EpisodeBatch:
    """The episodes of one training step; B episodes of S support and Q query patches.

    Attributes:
        tasks (list[int]): The task of each episode, an index into the library.
        lq (Tensor): ``(B, S + Q, 3, h, w)``: support patches, then query patches.
        gt (Tensor): ``(B, S + Q, 3, s h, s w)``.
        num_support (int): S.
    """

    tasks: list[int]
    lq: Tensor
    gt: Tensor
    num_support: int

    def support_and_query(self, episode: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """``(lq, gt)`` of an episode's support patches, and of its query patches."""
        lq, gt = self.lq[episode], self.gt[episode]
        return (lq[: self.num_support], gt[: self.num_support]), (lq[self.num_support :], gt[self.num_support :])
