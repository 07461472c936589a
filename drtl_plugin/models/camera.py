"""The camera fit of a run: read from a file, or fitted to the target's pairs once, by the first process."""

from __future__ import annotations

import torch

from drtl_plugin.data.interface import EpisodeDataset
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.runtime import checkpoints
from drtl_plugin.runtime.distributed import of_first_process
from drtl_plugin.runtime.progress import stage
from drtl_plugin.tasks.camera_fit import CameraFit, check_pairs, fit_camera

# Auxiliary GT patches that the sharpness of the target's GT is compared with.
_NUM_PATCHES = 64


def load_camera(path: str, scale: int) -> CameraFit:
    """Read the file of ``path.pretrain_camera_fit``.

    Raises:
        DataError: If it cannot be read.
        OptionError: If its scale differs.
    """
    try:
        fit = CameraFit.from_state(checkpoints.read(path, 'path.pretrain_camera_fit'))
    except ValueError:
        raise DataError(f'path.pretrain_camera_fit: {path} is not a camera fit.') from None
    if fit.scale != scale:
        raise OptionError(f'path.pretrain_camera_fit: {path} is for scale {fit.scale}, not {scale}.')
    return fit


def check_target(train_set: EpisodeDataset) -> None:
    """Check that a camera can be fitted to the target's pairs.

    Args:
        train_set (EpisodeDataset): The training set; it has a target.

    Raises:
        DataError: If the pairs are too small, or black in a colour.
    """
    try:
        check_pairs(train_set.target_pairs or ())
    except DataError as error:
        raise DataError(f'drtl.camera_fit: {error} Turn it off with camera_fit: false.') from None


def fit_to_target(train_set: EpisodeDataset, seed: int) -> CameraFit:
    """Fit the camera to the target's pairs; takes 8 s for the sample camera on 2 idle CPU cores.

    Args:
        train_set (EpisodeDataset): The training set; it has a target.
        seed (int): Seed of the auxiliary patches.

    Raises:
        DataError: See :func:`check_target`.
    """
    check_target(train_set)
    pairs = train_set.target_pairs or ()
    patches = train_set.gt_patches(_NUM_PATCHES, torch.Generator().manual_seed(seed))

    def fit() -> CameraFit:
        with stage(f'Fitting the camera ({len(pairs)} pairs)'):
            return fit_camera(pairs, patches)

    return of_first_process(fit)
