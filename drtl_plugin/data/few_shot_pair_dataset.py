"""The support set of a target camera: K pairs, chosen by seed or by name."""

from __future__ import annotations

import random
from pathlib import Path

from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import DATASET_REGISTRY
from torch import Tensor

from drtl_plugin.data.image_files import check_pair_sizes, check_paired_keys, require
from drtl_plugin.errors import DataError, unknown
from drtl_plugin.options.convert import default
from drtl_plugin.options.sections import TargetOptions


@DATASET_REGISTRY.register()
class FewShotPairDataset(PairedImageDataset):
    """K pairs of an LQ and a GT photograph of the same scene.

    It reads the same sources as BasicSR's ``PairedImageDataset`` (LMDB, meta-info file or folder), and keeps K pairs.

    Args:
        opt (dict): Config. The keys of ``PairedImageDataset``, and:
            num_shot (int): K. Default: 5.
            seed (int): Selects the K pairs if there are more. Default: 0.
            names (list[str]): Names of the pairs, without extension, instead of a seed. Default: None.

    Raises:
        DataError: If a folder is missing, there are fewer than ``num_shot`` pairs, or the sizes of a pair don't fit
            ``scale``.
        OptionError: If there is no pair with a given name.
    """

    def __init__(self, opt: dict) -> None:
        for key in ('dataroot_lq', 'dataroot_gt'):
            require(opt[key], key)
        if opt['io_backend']['type'] == 'lmdb':
            check_paired_keys(opt['dataroot_lq'], opt['dataroot_gt'], 'dataroot_lq')
        try:
            # PairedImageDataset empties the io_backend that it is given.
            super().__init__({'use_hflip': True, 'use_rot': True, **opt, 'io_backend': dict(opt['io_backend'])})
        except (AssertionError, ValueError) as error:  # PairedImageDataset raises it if folders don't match
            raise DataError(f'{opt["dataroot_lq"]}: {error}') from None
        self.paths: list[dict[str, str]]
        names = opt.get('names')
        num_shot = len(names) if names is not None else opt.get('num_shot', default(TargetOptions, 'num_shot'))
        if len(self.paths) < num_shot:
            raise DataError(f'{opt["dataroot_lq"]}: num_shot is {num_shot}, but there are {len(self.paths)} pairs.')
        if names is None:
            self.paths = sorted(self.paths, key=lambda path: path['gt_path'])
            chosen = sorted(
                random.Random(opt.get('seed', default(TargetOptions, 'seed'))).sample(range(len(self.paths)), num_shot)
            )
            self.paths = [self.paths[i] for i in chosen]
        else:
            by_name = {Path(path['gt_path']).stem: path for path in self.paths}
            for name in names:
                if name not in by_name:
                    raise unknown('pair', name, by_name, f'names of {opt["dataroot_gt"]}')
            self.paths = [by_name[name] for name in names]
        check_pair_sizes(self)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """All K pairs in full.

        Returns:
            list[tuple[Tensor, Tensor]]: ``(lq, gt)``, RGB, uint8 (BasicSR reads 8 bits; photographs are large),
            ``(3, H, W)`` and ``(3, scale H, scale W)``.
        """
        phase, self.opt['phase'] = self.opt['phase'], 'val'  # PairedImageDataset crops patches in training
        try:
            items = (self[i] for i in range(len(self)))
            return [tuple((item[key] * 255).round().byte() for key in ('lq', 'gt')) for item in items]
        finally:
            self.opt['phase'] = phase
