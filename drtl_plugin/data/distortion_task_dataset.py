"""Episodes of the auxiliary tasks."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from basicsr.data.data_util import paths_from_lmdb
from basicsr.utils import FileClient, img2tensor
from basicsr.utils.registry import DATASET_REGISTRY
from torch import Tensor
from torch.utils import data

from drtl_plugin.data.few_shot_pair_dataset import FewShotPairDataset
from drtl_plugin.data.image_files import check_lmdb, decode, image_names, image_size, lmdb_sizes, names_of_list
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.options.convert import parse_section
from drtl_plugin.options.sections import TaskDatasetOptions
from drtl_plugin.tasks.library import DistortionLibrary
from drtl_plugin.tasks.patches import augment, random_crop

# Up to this number of images, all headers are read before training.
_FEW = 64


def build_target(opt: TaskDatasetOptions) -> FewShotPairDataset | None:
    """The support set that ``datasets.train.target`` describes; None if there is no such section."""
    if opt.target is None:
        return None
    return FewShotPairDataset(
        {**msgspec.structs.asdict(opt.target), 'name': f'{opt.name} target', 'phase': 'train', 'scale': opt.scale}
    )


@DATASET_REGISTRY.register()
class DistortionTaskDataset(data.Dataset):
    """Episodes: support and query patches of one auxiliary task each.

    As with BasicSR's ``RealESRGANDataset``, an item has only GT patches: the model draws the task of an episode and
    makes the LQ patches, on its device and in batches. An episode depends only on ``seed`` and its index, not on the
    number of loader processes.

    Args:
        opt (dict): Config for train datasets; its keys, with defaults, are
            :class:`drtl_plugin.options.sections.TaskDatasetOptions`. The most used ones:
            dataroot_gt (str): Folder (or .lmdb) of ground-truth images.
            io_backend (dict): IO backend type and other kwarg; disk or lmdb.
            gt_size (int): Side of the ground-truth patches.
            num_support, num_query (int): Patches per episode, for the inner and the outer loop.
            distortions (str | list[dict]): ``'default'`` or the auxiliary tasks;
                see :class:`drtl_plugin.tasks.library.DistortionLibrary`.
            target (dict): The support set: dataroot_gt, dataroot_lq, num_shot, seed or names, io_backend;
                see :class:`drtl_plugin.options.sections.TargetOptions`.

            scale (int): Scale, which will be added automatically.
            phase (str): 'train', which will be added automatically.

    Raises:
        OptionError: If an option is unknown, of the wrong type or out of range.
        DataError: If a folder is missing or holds no images, or pairs don't fit; when an image is drawn that is
            damaged or smaller than ``gt_size``.

    Attributes:
        options_class (type): The section that declares its options. A subclass with options of its own sets one that
            derives from :class:`drtl_plugin.options.sections.TaskDatasetOptions`.
        options (TaskDatasetOptions): Parsed options.
        library (DistortionLibrary): The auxiliary tasks.
        target_pairs (list[tuple[Tensor, Tensor]] | None): All pairs ``(lq, gt)`` of the target, RGB, uint8,
            ``(3, H, W)`` and ``(3, scale H, scale W)``; None without a target.
    """

    options_class = TaskDatasetOptions

    def __init__(self, opt: dict) -> None:
        self.opt = opt
        options = parse_section(self.options_class, opt, 'datasets.train')
        self.options = options
        if options.gt_size % options.scale:
            raise OptionError(f'datasets.train.gt_size: {options.gt_size} is not a multiple of scale {options.scale}.')
        self.library = DistortionLibrary(options.distortions, options.scale, 'datasets.train.distortions')
        self.file_client: Any = None
        self.keys = self._find_images()
        target = build_target(options)
        self.target_pairs = target.pairs() if target is not None else None
        self._decoded: dict[int, np.ndarray] = {}
        # A prefetcher's thread draws episodes while the model draws patches.
        self._lock = threading.Lock()
        # Each loader process has its own copy beside this one, from which the model draws.
        self._cache_size = options.image_cache_mb * 2**20 / (options.num_worker_per_gpu + 1)

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, decoded images and the lock, for loader processes that are spawned."""
        state = {**self.__dict__, 'file_client': None, '_decoded': {}}
        del state['_lock']
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _find_images(self) -> list[str]:
        options = self.options
        if options.io_backend.get('type') == 'lmdb':
            check_lmdb(options.dataroot_gt, 'datasets.train.dataroot_gt')
            return sorted(paths_from_lmdb(options.dataroot_gt))
        if options.meta_info_file is not None:
            names = names_of_list(options.meta_info_file, 'datasets.train.meta_info_file')
        else:
            names = image_names(options.dataroot_gt, 'datasets.train.dataroot_gt')
        root = str(Path(options.dataroot_gt))
        return [os.path.join(root, name) for name in names]

    def _image(self, index: int) -> np.ndarray:
        """An image as uint8 ``(H, W, 3)``, BGR. Decoding is most of a patch's cost, so the last images are kept."""
        with self._lock:
            if index in self._decoded:
                return self._decoded[index]
            image = self._read_image(index)
            if image.nbytes <= self._cache_size:
                while sum(kept.nbytes for kept in self._decoded.values()) + image.nbytes > self._cache_size:
                    self._decoded.pop(next(iter(self._decoded)))
                self._decoded[index] = image
            return image

    def _read_image(self, index: int) -> np.ndarray:
        backend = dict(self.options.io_backend)
        if self.file_client is None:
            if backend['type'] == 'lmdb':
                backend.update(db_paths=[self.options.dataroot_gt], client_keys=['gt'])
            self.file_client = FileClient(backend.pop('type'), **backend)
        key = self.keys[index]
        try:
            image = decode(self.file_client.get(key, 'gt'))
        except OSError as error:
            raise DataError(f'{key}: cannot be read ({error.strerror}).') from None
        if image is None:
            raise DataError(f'{key} of {self.options.dataroot_gt}: cannot be read as an image.')
        self._check_size(key, image.shape[:2])
        return image

    def _check_size(self, key: str, size: tuple[int, int]) -> None:
        if min(size) < self.options.gt_size:
            raise DataError(
                f'{key}: {size[1]}x{size[0]} is smaller than gt_size {self.options.gt_size}; remove it, or lower '
                'datasets.train.gt_size.'
            )

    def check_image_sizes(self) -> None:
        """Check an LMDB's list, or the headers of the images in a small folder, before training.

        Reading the headers of thousands of images takes minutes. Of a large folder, one episode is drawn instead; the
        other images are checked when they are drawn.

        Raises:
            DataError: Names the first image that cannot be read or is smaller than ``gt_size``.
        """
        if self.options.io_backend['type'] == 'lmdb':
            sizes = lmdb_sizes(self.options.dataroot_gt)
        elif len(self.keys) <= _FEW:
            sizes = {key: image_size(key) for key in self.keys}
        else:
            self[0]
            return
        for key, size in sizes.items():
            self._check_size(key, size)

    def gt_patches(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw GT patches, each from a random image.

        Args:
            num (int): How many.
            generator (torch.Generator): On the CPU.

        Returns:
            Tensor: ``(num, 3, gt_size, gt_size)``, RGB in [0, 1].
        """
        patches = []
        for index in torch.randint(0, len(self.keys), (num,), generator=generator).tolist():
            image = torch.from_numpy(self._image(index)).permute(2, 0, 1)
            crop = random_crop([image], [self.options.gt_size], generator)
            patch = augment(crop, generator, self.options.use_hflip, self.options.use_rot)[0]
            patches.append(img2tensor(np.ascontiguousarray(patch.permute(1, 2, 0).numpy())) / 255)
        return torch.stack(patches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One episode.

        Returns:
            dict: ``index`` (int), ``support_gt`` ``(num_support, 3, gt_size, gt_size)`` and ``query_gt``
            ``(num_query, 3, gt_size, gt_size)``, RGB in [0, 1].
        """
        options = self.options
        generator = torch.Generator().manual_seed(options.seed * options.num_episodes + index)
        gt = self.gt_patches(options.num_support + options.num_query, generator)
        return {'index': index, 'support_gt': gt[: options.num_support], 'query_gt': gt[options.num_support :]}

    def __len__(self) -> int:
        return self.options.num_episodes
