"""Draws the auxiliary task of each episode, and makes its LQ patches from GT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drtl_plugin.data.interface import EpisodeBatch, EpisodeDataset
from drtl_plugin.errors import OptionError
from drtl_plugin.options.sections import DRTLOptions
from drtl_plugin.relation.estimators import RelationEvidence, needs_drn
from drtl_plugin.runtime.device import synthesis_device
from drtl_plugin.tasks.camera_fit import CameraFit
from drtl_plugin.tasks.patches import paired_patches


def check_training_set(train_set: EpisodeDataset, drtl: DRTLOptions, net_r: nn.Module | None) -> None:
    """Check that a training set fits the ``drtl`` section and the DRN.

    Raises:
        OptionError: If there are too few pairs for early stopping, or the relation lacks its DRN, or the
            patches are smaller than the DRN's windows, or if a task has the camera fit's label.
    """
    pairs = train_set.target_pairs
    if pairs is None:
        return
    if drtl.adapt.early_stop and len(pairs) < 2:
        raise OptionError('drtl.adapt.early_stop: holding out pairs needs at least 2 pairs, but there is only 1.')
    if drtl.camera_fit:
        train_set.library.check_label(CameraFit.label)
    relation = drtl.weighting.relation
    if needs_drn(relation):
        if net_r is None:
            raise OptionError(f'network_r is missing: drtl.weighting.relation {relation!r} needs a DRN.')
        window, scale = getattr(net_r, 'window', 1), train_set.library.scale
        if train_set.options.gt_size < window * scale:
            raise OptionError(
                f'datasets.train.gt_size: network_r uses windows of {window} LQ pixels, so at scale {scale} '
                f'gt_size must be at least {window * scale}.'
            )


class Episodes:
    """The auxiliary tasks of a run, and everything drawn from them.

    Draws depend only on the seed, the number of updates so far, and the episode or the purpose. A training state
    therefore holds no generator, and several processes draw the same as one.

    Args:
        train_set (EpisodeDataset): The training set.
        camera_fit (CameraFit | None): The fitted camera, which becomes the last task.
        device (torch.device): The network's; all patches are returned there, except :meth:`auxiliary_gt`.
        seed (int): ``manual_seed``.

    Attributes:
        library (DistortionLibrary): The N tasks.
        device (torch.device): Where LQ patches are made.
        lq_size (int): Side of the LQ patches.

    Raises:
        OptionError: If a task already has the camera fit's label.
    """

    def __init__(
        self, train_set: EpisodeDataset, camera_fit: CameraFit | None, device: torch.device, seed: int
    ) -> None:
        self.library = train_set.library if camera_fit is None else train_set.library.with_task(camera_fit)
        self._train_set = train_set
        self._camera_fit = camera_fit
        self.device = synthesis_device(device)
        self.lq_size = train_set.options.gt_size // self.library.scale
        self._network_device = device
        self._seed = seed

    def draw(self, data: dict[str, Any], weights: Tensor | None, num_update: int) -> EpisodeBatch:
        """Draw the tasks of a step's episodes, and make their LQ patches.

        Args:
            data (dict): A batch of the training set: ``index`` ``(B,)``, ``support_gt`` ``(B, S, 3, H, W)`` and
                ``query_gt`` ``(B, Q, 3, H, W)``.
            weights (Tensor | None): ``(N,)``: probabilities of the tasks, up to a factor; None: uniform.
            num_update (int): Training steps so far.
        """
        indices = data['index'].tolist()
        seeds = [self._seeds([num_update, index]) for index in indices]
        tasks = [self.draw_task(torch.Generator().manual_seed(seed), weights) for seed, _ in seeds]
        gt = torch.cat([data['support_gt'], data['query_gt']], dim=1)
        gt = self._as_soft_as_target(gt.flatten(0, 1)).view(gt.shape)
        generators = [torch.Generator(self.device).manual_seed(seed) for _, seed in seeds]
        lq = torch.stack(
            [self.library.tasks[task](*episode) for task, *episode in zip(tasks, gt, generators, strict=True)]
        )
        return EpisodeBatch(tasks, *self.on_network_device(lq, gt), data['support_gt'].shape[1])

    def on_network_device(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Both tensors on the device of the network."""
        return first.to(self._network_device, non_blocking=True), second.to(self._network_device, non_blocking=True)

    def draw_task(self, generator: torch.Generator, weights: Tensor | None) -> int:
        """Draw a task with probabilities proportional to ``weights``; None: uniformly."""
        if weights is None:
            return int(torch.randint(0, len(self.library), (), generator=generator))
        return int(torch.multinomial(weights, 1, generator=generator))

    def generators(self, purpose: str, num_update: int) -> tuple[torch.Generator, torch.Generator]:
        """New generators for a purpose, independent of those for other purposes.

        Returns:
            tuple[torch.Generator, torch.Generator]: One on the CPU, which draws patches, and one on the device, which
            draws distortions.
        """
        patch_seed, distortion_seed = self._seeds([num_update], tuple(purpose.encode()))
        return (
            torch.Generator().manual_seed(patch_seed),
            torch.Generator(self.device).manual_seed(distortion_seed),
        )

    def _seeds(self, entropy: list[int], spawn_key: tuple[int, ...] = ()) -> list[int]:
        """Two seeds: one for draws on the CPU, and one for draws on the device."""
        sequence = np.random.SeedSequence([self._seed, *entropy], spawn_key=spawn_key)
        return [int(word) >> 1 for word in sequence.generate_state(2, np.uint64)]

    def auxiliary_gt(self, num: int, generator: torch.Generator) -> Tensor:
        """GT patches ``(num, 3, H, W)`` on :attr:`device`, as soft as the target's GT if there is a camera fit."""
        return self._as_soft_as_target(self._train_set.gt_patches(num, generator))

    def _as_soft_as_target(self, gt: Tensor) -> Tensor:
        gt = gt.to(self.device, non_blocking=True)
        return gt if self._camera_fit is None else self._camera_fit.ground_truth(gt)

    def auxiliary_pairs(
        self, num: int, patch_generator: torch.Generator, distortion_generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The same P = ``num`` patches under each of the N tasks.

        Args:
            num (int): P.
            patch_generator, distortion_generator (torch.Generator): From :meth:`generators`.

        Returns:
            tuple[Tensor, Tensor]: gt ``(P, 3, s h, s w)`` and lq ``(N, P, 3, h, w)``.
        """
        gt = self.auxiliary_gt(num, patch_generator)
        lq = torch.stack([task(gt, distortion_generator) for task in self.library.tasks])
        return self.on_network_device(gt, lq)

    def target_patches(
        self, num: int, generator: torch.Generator, pairs: Sequence[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Patches ``(lq, gt)`` of the target's pairs or of some of them, ``(num, 3, h, w)``, ``(num, 3, s h, s w)``.

        Pairs that are smaller than ``gt_size`` give smaller patches.
        """
        options = self._train_set.options
        pairs = self._train_set.target_pairs if pairs is None else pairs
        lq, gt = paired_patches(pairs or (), num, self.lq_size, generator, options.use_hflip, options.use_rot)
        return self.on_network_device(lq, gt)

    def relation_evidence(self, num: int, num_update: int) -> RelationEvidence:
        """``num`` auxiliary and ``num`` target patches for the relation estimators."""
        patch_generator, distortion_generator = self.generators('relation evidence', num_update)
        gt, lq = self.auxiliary_pairs(num, patch_generator, distortion_generator)
        return RelationEvidence(lq, gt, *self.target_patches(num, patch_generator))
