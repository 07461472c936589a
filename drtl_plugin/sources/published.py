"""Conversion of published datasets to the folders that option files use.

:func:`prepare_pairs` converts pairs of real cameras: RealSR (version 3, Cai et al., ICCV 2019), DRealSR (Wei et al.,
ECCV 2020) and City100 (Chen et al., CVPR 2019). :func:`prepare_subimages` cuts photographs for the auxiliary tasks,
such as DIV2K and Flickr2K, into sub-images that load quickly. Nothing is downloaded, and the source is not changed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from basicsr.utils.matlab_functions import imresize

from drtl_plugin.data.image_files import image_names, image_size, read_image
from drtl_plugin.errors import DataError
from drtl_plugin.runtime.progress import progress
from drtl_plugin.sources.layouts import PAIRED_DATASETS, SourcePair

# A multiple of all scales that City100 is used at.
_CITY100_MULTIPLE = 12


def prepare_pairs(dataset: str, source: str | Path, target: str | Path, scale: int, camera: str | None = None) -> dict:
    """Convert a published dataset to ``support/{gt,lq}`` and ``val/{gt,lq}``, with equal file names in gt and lq.

    RealSR and DRealSR: the training part becomes ``support``, the test part ``val``; files are copied. City100: 5 and
    10 of its 100 pairs, cropped to a multiple of 12 pixels; LQ, published at the size of GT, is reduced by MATLAB's
    bicubic ``imresize``.

    Args:
        dataset (str): One of ``PAIRED_DATASETS``.
        source (str | Path): Folder of the unpacked archive, or a parent of it.
        target (str | Path): Folder to write; it gets this name when it is complete.
        scale (int): Scale of the pairs.
        camera (str | None): Take only pairs of this camera; None takes all.

    Returns:
        dict: Number of pairs by split.

    Raises:
        DataError: If no pairs are found, an image is missing or does not fit the size of its partner, two pairs have
            the same name, or the target exists.
    """
    layout = PAIRED_DATASETS[dataset]
    if scale not in layout.scales:
        raise DataError(f'--scale {scale}: {dataset} has {", ".join(map(str, layout.scales))}.')
    if layout.cameras and camera is not None and camera not in layout.cameras:
        raise DataError(f'--camera {camera}: {dataset} has {", ".join(layout.cameras)}.')
    if layout.interpolated and camera is None:
        raise DataError(f'--camera is missing: {dataset} has {", ".join(layout.cameras)}, with the same names.')
    _require_folder(source)
    pairs = list(layout.find(Path(source), camera, scale))
    counts = {split: sum(pair.split == split for pair in pairs) for split in ('support', 'val')}
    if not all(counts.values()):
        expected = ' '.join((layout.find.__doc__ or '').split())
        raise DataError(f'{source}: no {dataset} pairs of scale {scale} for both parts; expected {expected}')
    seen: dict[tuple[str, str], Path] = {}
    for pair in pairs:
        other = seen.setdefault((pair.split, pair.name), pair.gt)
        if other != pair.gt:
            raise DataError(
                f'{source}: {other} and {pair.gt} are pairs with the same name; name a subfolder as source.'
            )
        ratio = 1 if layout.interpolated else scale
        if not pair.lq.is_file():
            raise DataError(f'{pair.gt}: its LQ image {pair.lq.name} is missing.')
        gt_size, lq_size = image_size(str(pair.gt)), image_size(str(pair.lq))
        if gt_size != tuple(ratio * extent for extent in lq_size):
            raise DataError(
                f'{pair.lq}: {lq_size[1]}x{lq_size[0]}, but {pair.gt.name} is {gt_size[1]}x{gt_size[0]}, not {ratio} '
                'times that.'
            )
    with _appearing(target) as folder:
        for pair in progress(pairs, dataset, len(pairs), 'pair'):
            for part in ('gt', 'lq'):
                (folder / pair.split / part).mkdir(parents=True, exist_ok=True)
            if layout.interpolated:
                _write_reduced(pair, folder / pair.split, scale)
                continue
            for part, path in (('gt', pair.gt), ('lq', pair.lq)):
                shutil.copyfile(path, folder / pair.split / part / (pair.name + path.suffix))
    return counts


def _write_reduced(pair: SourcePair, folder: Path, scale: int) -> None:
    images = []
    for path in (pair.gt, pair.lq):
        image = read_image(path).astype(np.float32) / 255
        height, width = (extent - extent % _CITY100_MULTIPLE for extent in image.shape[:2])
        images.append(image[:height, :width])
    gt, lq = images
    lq = imresize(np.ascontiguousarray(lq), 1 / scale)
    for part, image in (('gt', gt), ('lq', lq)):
        _write_png(folder / part / f'{pair.name}.png', (image * 255).round().clip(0, 255).astype(np.uint8))


def prepare_subimages(sources: list[str], target: str | Path, size: int = 480, step: int = 240) -> int:
    """Cut photographs into overlapping square sub-images, as is common for DIV2K and Flickr2K.

    The last sub-image of a row or column ends at the border, so that the photograph is covered completely.

    Args:
        sources (list[str]): Folders of photographs.
        target (str | Path): Folder to write PNG files to; it gets this name when it is complete.
        size (int): Side of a sub-image, in pixels.
        step (int): Distance between neighbouring sub-images, in pixels.

    Returns:
        int: Number of sub-images.

    Raises:
        DataError: If a folder contains no images, an image cannot be read or is smaller than ``size``, two images have
            the same name, or the target exists.
    """
    paths = [Path(source, name) for source in sources for name in image_names(source, 'source')]
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(path.stem, path)
        if other != path:
            raise DataError(f'{path}: {other} has the same name; rename one of them.')
        height, width = image_size(str(path))
        if min(height, width) < size:
            raise DataError(f'{path}: {width}x{height} is smaller than sub-images of {size}; choose a smaller --size.')

    with _appearing(target) as folder:

        def cut(path: Path) -> int:
            image = read_image(path)
            corners = [[*range(0, extent - size, step), extent - size] for extent in image.shape[:2]]
            places = [(top, left) for top in corners[0] for left in corners[1]]
            for i, (top, left) in enumerate(places, 1):
                _write_png(folder / f'{path.stem}_s{i:03d}.png', image[top : top + size, left : left + size])
            return len(places)

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV releases the GIL
            return sum(progress(pool.map(cut, paths), 'sub-images', len(paths), 'image'))


def _require_folder(path: str | Path) -> None:
    if not Path(path).is_dir():
        raise DataError(f'source: there is no folder {path}; unpack the archive first.')


@contextmanager
def _appearing(target: str | Path) -> Iterator[Path]:
    """A folder that is renamed to ``target`` when it is complete."""
    target = Path(target)
    if target.exists():
        raise DataError(f'target: {target} already exists; remove it or choose another name.')
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix='.unfinished_') as unfinished:
        folder = Path(unfinished, 'complete')
        folder.mkdir()
        yield folder
        folder.rename(target)


def _write_png(path: Path, image: np.ndarray) -> None:
    path.write_bytes(cv2.imencode('.png', image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())
