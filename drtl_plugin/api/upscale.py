"""``basicsr upscale``: restores images of all common kinds with a trained network."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from drtl_plugin.data.image_files import IMAGE_SUFFIXES, how_to_convert, image_names, is_unread, shortened
from drtl_plugin.data.photographs import TIFF_SUFFIXES, read_photograph, write_photograph
from drtl_plugin.errors import DataError, OptionError, describe, own_line
from drtl_plugin.runtime.device import current
from drtl_plugin.runtime.progress import Pulse, progress
from drtl_plugin.runtime.tiles import parts, restore
from drtl_plugin.runtime.trained_network import TrainedNetwork

# Formats that keep more than 8 bits, and an alpha channel.
_DEEP = ('.png', *TIFF_SUFFIXES)
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
    """Restore an image, or all images of a folder. Images that fail are reported, and the others are restored.

    Results keep colour profile, EXIF and XMP; one warning names what their formats cannot hold.

    Args:
        network (TrainedNetwork): The network; moved to the device of this process, see
            :func:`drtl_plugin.runtime.device.current`.
        source (str): Image or folder.
        target (str): Folder to write, or, for a single image, also a file.
        tile (int), overlap (int): See :func:`~drtl_plugin.runtime.tiles.restore`.
        suffix (str): Appended to the names of results.
        ext (str): Format of the results, e.g. ``png``; ``auto`` keeps each image's own, or PNG if it cannot hold an
            alpha channel.
        full_precision (bool): On a GPU, compute in single instead of half precision. CPUs always use single precision.

    Returns:
        tuple[list[Path], list[str]]: The files written, and a line for each image that failed.

    Raises:
        DataError: If there is no image, or a result would overwrite an input image or another result.
        OptionError: If an argument is out of range.
    """
    if tile < 0 or overlap < 0:
        raise OptionError('--tile and --overlap must not be below 0.')
    if ext != 'auto' and f'.{ext}' not in IMAGE_SUFFIXES:
        raise OptionError(f'--ext: {ext!r} is none of auto, {", ".join(s[1:] for s in IMAGE_SUFFIXES)}.')
    if os.sep in suffix or '/' in suffix:
        raise OptionError(f'--suffix: {suffix!r} must be part of a name, not a path.')
    pairs = _pairs(source, target, suffix, ext)
    device = current()
    net = network.net.to(device)
    half = device.type != 'cpu' and not full_precision

    def restored(lq: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.float16, enabled=half):
            return restore(net, lq.to(device), network.scale, network.window).float()

    written: list[Path] = []
    failed: list[str] = []
    lost: dict[str, list[Path]] = {}
    taken = {path.resolve() for pair in pairs for path in pair}
    pulse = Pulse()
    for image, result in progress(pairs, 'upscale', len(pairs), 'image', pulse):
        try:
            path, missing = _upscale_file(restored, image, result, network.scale, tile, overlap, taken, pulse)
            written.append(path)
            for what in sorted(missing):
                lost.setdefault(what, []).append(path)
        except Exception as error:
            is_plain = isinstance(error, (DataError, OSError))
            reason = ' '.join(str(error).split()) if is_plain else f'{describe(error)}{own_line(error)}'
            failed.append(f'{image}: {reason.removeprefix(f"{image}: ")}')
            tqdm.write(f'basicsr: warning: {failed[-1]}', file=sys.stderr)
    if lost:
        _warn_of_losses(lost)
    return written, failed


def _warn_of_losses(lost: dict[str, list[Path]]) -> None:
    """Print one line that says what was lost, and in which results."""
    losses = [f'{what} ({shortened(path.name for path in paths)})' for what, paths in lost.items()]
    deep = all(path.suffix.lower() in _DEEP for paths in lost.values() for path in paths)
    hint = '.' if deep else '; PNG and TIFF hold the most (--ext png).'
    print(f'basicsr: warning: results lack {", ".join(losses)}{hint}', file=sys.stderr)


def _pairs(source: str, target: str, suffix: str, ext: str) -> list[tuple[Path, Path]]:
    """Images, and the files to write."""
    origin, goal = Path(source), Path(target)
    if not origin.exists():
        raise DataError(f'-i: there is no {source}.')
    unread = how_to_convert(origin.iterdir() if origin.is_dir() else [origin])
    if is_unread(origin):
        raise DataError(f'-i: {unread}')
    images = [origin / name for name in image_names(source, '-i')] if origin.is_dir() else [origin]
    if origin.is_file() and goal.suffix and not goal.is_dir():
        pairs = [(origin, goal.with_name(f'{goal.stem}{suffix}{goal.suffix if ext == "auto" else f".{ext}"}'))]
    else:
        pairs = [(i, goal / f'{i.stem}{suffix}{i.suffix if ext == "auto" else f".{ext}"}') for i in images]
    if unread:
        print(f'basicsr: warning: {source}: {unread}', file=sys.stderr)
    kept = {image.resolve() for image in images}
    results: dict[Path, Path] = {}
    for image, result in pairs:
        if result.suffix.lower() not in IMAGE_SUFFIXES:
            raise OptionError(f'-o: {result} is none of the formats {", ".join(IMAGE_SUFFIXES)}.')
        if result.resolve() in kept:
            raise DataError(f'-o: {result} is an input image; choose another folder, or a --suffix.')
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
    pulse: Pulse,
) -> tuple[Path, set[str]]:
    img, metadata = read_photograph(path)
    alpha = img.shape[-1] == 4
    if alpha and result.suffix.lower() not in _WITH_ALPHA:
        result = result.with_suffix('.png')
        if result.resolve() in taken:
            raise DataError(f'{path}: has an alpha channel and would become {result}, which is taken; use --suffix.')
        taken.add(result.resolve())
    lost = set()
    if img.dtype == np.uint16 and result.suffix.lower() not in _DEEP:
        img = np.round(img / 257).astype(np.uint8)
        lost.add('bits beyond 8')
    result.parent.mkdir(parents=True, exist_ok=True)
    img = upscale_array(restored, img, scale, tile, overlap, path.name, pulse)
    return result, lost | write_photograph(result, img, metadata)


def upscale_array(
    restored: Callable[[Tensor], Tensor],
    img: np.ndarray,
    scale: int,
    tile: int,
    overlap: int,
    name: str,
    pulse: Pulse,
) -> np.ndarray:
    """Restore an image tile by tile, so that the memory that the network needs does not grow with it.

    Args:
        restored (Callable): Maps RGB in [0, 1], ``(1, 3, h, w)``, to ``(1, 3, scale · h, scale · w)``.
        img (np.ndarray): ``(H, W, C)``, uint8 or uint16; grey, BGR, or BGR with alpha, which is restored like a grey
            image.
        scale (int), tile (int), overlap (int): See :func:`~drtl_plugin.runtime.tiles.restore`; 0 for no tiles.
        name (str): Name of the image, for the progress bar.
        pulse (Pulse): See :func:`~drtl_plugin.runtime.progress.progress`.

    Returns:
        np.ndarray: ``(scale · H, scale · W, C)``, of the same type.
    """
    height, width, channels = img.shape
    peak = np.iinfo(img.dtype).max
    result = np.empty((height * scale, width * scale, channels), img.dtype)
    tiles = parts(height, width, tile or max(height, width), overlap)
    for part in progress(tiles, name, len(tiles), 'tile', pulse):
        seen = img[part.seen].astype(np.float32) / peak
        planes = [seen[..., 2::-1]] if channels >= 3 else [np.repeat(seen, 3, axis=-1)]
        if channels == 4:
            planes.append(np.repeat(seen[..., 3:], 3, axis=-1))
        outputs = []
        for plane in planes:
            lq = torch.from_numpy(np.ascontiguousarray(plane.transpose(2, 0, 1)))[None]
            rows, columns = part.kept(scale)
            outputs.append(restored(lq)[0, :, rows, columns])
        colour = outputs[0].flip(0) if channels >= 3 else outputs[0].mean(dim=0, keepdim=True)
        output = torch.cat([colour, *(grey.mean(dim=0, keepdim=True) for grey in outputs[1:])])
        if not output.isfinite().all():
            raise DataError('the network returns infinite or undefined numbers; try --fp32.')
        # Rounded on the device: a GPU is faster, and bytes need a quarter of the bandwidth of floats.
        levels = output.clamp(0, 1).mul(peak).round().to(torch.uint8 if peak == 255 else torch.int32)
        result[part.place(scale)] = levels.permute(1, 2, 0).contiguous().cpu().numpy()
    return result
