"""Restoring photographs, of all the kinds that people have, by a trained network."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from drtl_plugin.data.image_files import IMAGE_SUFFIXES, image_names, orientation, upright
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.models.tiles import parts, restore
from drtl_plugin.trained import TrainedNetwork

# Formats that keep more than 8 bits, and an alpha channel.
_DEEP = ('.png', '.tif', '.tiff')
_WITH_ALPHA = (*_DEEP, '.webp')


def upscale(
    network: TrainedNetwork,
    source: str,
    target: str,
    tile: int = 512,
    overlap: int = 32,
    suffix: str = '',
    ext: str = 'auto',
    full_precision: bool = False,
) -> tuple[list[Path], list[str]]:
    """Restore an image, or all images of a folder. An image that fails is left out, and the others go on.

    Args:
        network (TrainedNetwork): The network; it is moved to the GPU where there is one.
        source (str): Image or folder.
        target (str): What to write: a folder, or, for a single image, also a file.
        tile (int), overlap (int): See :func:`~drtl_plugin.models.tiles.restore`.
        suffix (str): Appended to the names of results.
        ext (str): Format of the results, e.g. ``png``; ``auto`` takes each image's own. PNG takes the place of those
            that cannot hold an image's alpha channel.
        full_precision (bool): On a GPU, compute in single instead of half precision. On a CPU it is always single.

    Returns:
        tuple[list[Path], list[str]]: The files that were written, and a line for each image that failed.

    Raises:
        DataError: If there is no image, or a result would take the place of an image, or of another result.
        OptionError: If an argument makes no sense.
    """
    if tile < 0 or overlap < 0:
        raise OptionError('--tile and --overlap must not be below 0.')
    if ext != 'auto' and f'.{ext}' not in IMAGE_SUFFIXES:
        raise OptionError(f'--ext: {ext!r} is none of auto, {", ".join(s[1:] for s in IMAGE_SUFFIXES)}.')
    if os.sep in suffix or '/' in suffix:
        raise OptionError(f'--suffix: {suffix!r} must be part of a name, not a path.')
    pairs = _pairs(source, target, suffix, ext)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    net = network.net.to(device)
    half = device.type == 'cuda' and not full_precision

    def restored(lq: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.float16, enabled=half):
            return restore(net, lq.to(device), network.scale, network.window).float().cpu()

    written: list[Path] = []
    failed: list[str] = []
    taken = {path.resolve() for pair in pairs for path in pair}
    for image, result in tqdm(pairs, unit='image', disable=None):
        try:
            written.append(_upscale_file(restored, image, result, network.scale, tile, overlap, taken))
        except (DataError, OSError, RuntimeError, ValueError, cv2.error, MemoryError) as error:
            failed.append(f'{image}: {" ".join(str(error).split()).removeprefix(f"{image}: ")}')
            tqdm.write(f'basicsr: warning: {failed[-1]}', file=sys.stderr)
    return written, failed


def _pairs(source: str, target: str, suffix: str, ext: str) -> list[tuple[Path, Path]]:
    """Images, and the files that they are restored to."""
    origin, goal = Path(source), Path(target)
    if not origin.exists():
        raise DataError(f'-i: there is no {source}.')
    images = [origin / name for name in image_names(source, '-i')] if origin.is_dir() else [origin]
    if origin.is_file() and goal.suffix and not goal.is_dir():
        pairs = [(origin, goal.with_name(f'{goal.stem}{suffix}{goal.suffix if ext == "auto" else f".{ext}"}'))]
    else:
        pairs = [(i, goal / f'{i.stem}{suffix}{i.suffix if ext == "auto" else f".{ext}"}') for i in images]
    kept = {image.resolve() for image in images}
    results: dict[Path, Path] = {}
    for image, result in pairs:
        if result.suffix.lower() not in IMAGE_SUFFIXES:
            raise OptionError(f'-o: {result} is none of the formats {", ".join(IMAGE_SUFFIXES)}.')
        if result.resolve() in kept:
            raise DataError(f'-o: {result} is an image that is to be restored; choose another folder, or a --suffix.')
        if result in results:
            raise DataError(f'-o: {results[result]} and {image} would both become {result}; use --ext auto.')
        results[result] = image
    return pairs


def _upscale_file(
    restored: Callable[[Tensor], Tensor],
    path: Path,
    result: Path,
    scale: int,
    tile: int,
    overlap: int,
    taken: set[Path],
) -> Path:
    img = _read(path)
    alpha = img.shape[-1] == 4
    if alpha and result.suffix.lower() not in _WITH_ALPHA:
        result = result.with_suffix('.png')
        if result.resolve() in taken:
            raise DataError(
                f'{path}: has an alpha channel, which {result} is to hold, but that is taken; use --suffix.'
            )
        taken.add(result.resolve())
    if img.dtype == np.uint16 and result.suffix.lower() not in _DEEP:
        img = np.round(img / 257).astype(np.uint8)
    result.parent.mkdir(parents=True, exist_ok=True)
    _write(result, upscale_array(restored, img, scale, tile, overlap, path.name))
    return result


def _read(path: Path) -> np.ndarray:
    """``(H, W, C)`` as it is seen upright, BGR, of 8 or 16 bits: grey, colour, or colour with alpha."""
    try:
        content = np.fromfile(path, np.uint8)
        img = cv2.imdecode(content, cv2.IMREAD_UNCHANGED) if len(content) else None
    except (OSError, cv2.error):
        img = None
    if img is None:
        raise DataError(f'{path}: cannot be read as an image; it is damaged, cut short or of another kind.')
    # Alone among the ways of reading, the one that keeps alpha does not turn images upright.
    if img.ndim == 3 and img.shape[-1] == 4:
        img = upright(img, orientation(str(path)))
    else:
        img = cv2.imdecode(content, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR)
    if img.dtype not in (np.uint8, np.uint16):
        raise DataError(f'{path}: holds {img.dtype} values; images of 8 and 16 bits can be restored.')
    return img[..., None] if img.ndim == 2 else img


def upscale_array(
    restored: Callable[[Tensor], Tensor], img: np.ndarray, scale: int, tile: int, overlap: int, name: str = ''
) -> np.ndarray:
    """Restore an image in memory that the network's share of does not grow with it.

    Args:
        restored (Callable): Takes RGB in [0, 1], ``(1, 3, h, w)``, to ``(1, 3, scale · h, scale · w)``.
        img (np.ndarray): ``(H, W, C)``, uint8 or uint16; grey, BGR, or BGR with alpha, which is restored as a grey
            image is.
        scale (int), tile (int), overlap (int): See :func:`~drtl_plugin.models.tiles.restore`; 0 for no tiles.
        name (str): Of the image, for the progress bar.

    Returns:
        np.ndarray: ``(scale · H, scale · W, C)``, of the same kind.
    """
    height, width, channels = img.shape
    peak = np.iinfo(img.dtype).max
    result = np.empty((height * scale, width * scale, channels), img.dtype)
    tiles = parts(height, width, tile or max(height, width), overlap)
    for part in tqdm(tiles, desc=name, unit='tile', leave=False, delay=2, disable=None):
        seen = img[part.seen].astype(np.float32) / peak
        planes = [seen[..., 2::-1]] if channels >= 3 else [np.repeat(seen, 3, axis=-1)]
        if channels == 4:
            planes.append(np.repeat(seen[..., 3:], 3, axis=-1))
        outputs = []
        for plane in planes:
            lq = torch.from_numpy(np.ascontiguousarray(plane.transpose(2, 0, 1)))[None]
            outputs.append(restored(lq)[0].numpy().transpose(1, 2, 0)[part.kept(scale)])
        colour = outputs[0][..., ::-1] if channels >= 3 else outputs[0].mean(axis=-1, keepdims=True)
        output = np.concatenate([colour, *(grey.mean(axis=-1, keepdims=True) for grey in outputs[1:])], axis=-1)
        if not np.isfinite(output).all():
            raise DataError('the network makes infinite numbers of it, or none; try --fp32.')
        result[part.place(scale)] = np.round(np.clip(output, 0, 1) * peak)
    return result


def _write(path: Path, img: np.ndarray) -> None:
    """Write an image whole or not at all."""
    unfinished = path.with_name(f'.unfinished_{path.name}')
    try:
        if not cv2.imwrite(str(unfinished), img):
            raise DataError(f'{path} cannot be written.')
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
