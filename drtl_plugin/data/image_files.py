"""Image files and LMDBs: names, sizes from headers, checks before training, and decoding."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
from basicsr.data.data_util import paths_from_lmdb
from basicsr.utils import FileClient, imfrombytes
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from drtl_plugin import shell
from drtl_plugin.errors import DataError

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')
_JPEG_END = b'\xff\xd9'
# Unsupported formats, or of which OpenCV reads only a preview, and commands that convert them.
_RAW = ('.cr2', '.cr3', '.nef', '.nrw', '.arw', '.dng', '.raf', '.rw2', '.orf', '.pef', '.srw')
_CONVERTERS = {
    **dict.fromkeys(('.heic', '.heif', '.hif'), 'heif-convert {0} {1}.png'),
    '.avif': 'avifdec {0} {1}.png',
    '.jxl': 'djxl {0} {1}.png',
    **dict.fromkeys(('.psd', '.psb'), 'magick {0}[0] {1}.png'),
    **dict.fromkeys(_RAW, 'darktable-cli {0} {1}.tif'),
}


def require(root: str, key: str) -> None:
    """Raise DataError unless ``root`` (option ``key``) is a folder, or an LMDB with its meta_info.txt."""
    path = Path(root)
    if not path.is_dir():
        raise DataError(f'{key}: there is no folder {root}; create it or correct the option.')
    if path.suffix == '.lmdb' and not (path / 'meta_info.txt').is_file():
        raise DataError(
            f'{key}: {root} is not an LMDB in the BasicSR layout (meta_info.txt is missing); see basicsr lmdb.'
        )


def image_names(root: str, key: str) -> list[str]:
    """Names of the images directly in a folder, sorted.

    Raises:
        DataError: If the folder is missing or contains no image.
    """
    require(root, key)
    with os.scandir(root) as entries:  # BasicSR's scandir takes seconds for 100,000 files
        names = sorted(e.name for e in entries if e.name.lower().endswith(IMAGE_SUFFIXES) and _is_shown(e))
    if not names:
        unread = how_to_convert(Path(root).iterdir())
        found = f'; {unread}' if unread else '.'
        raise DataError(f'{key}: {root} contains no images ({", ".join(IMAGE_SUFFIXES)}){found}')
    return names


def _is_shown(entry: os.DirEntry) -> bool:
    return not entry.name.startswith('.') and entry.is_file()


def is_unread(path: Path) -> bool:
    """Whether a file, by its name, is a photograph in an unsupported format, which must be converted first."""
    return path.suffix.lower() in _CONVERTERS


def how_to_convert(paths: Iterable[Path]) -> str:
    """One line that names photographs in unsupported formats and how to convert them; empty if there are none."""
    unread = sorted(path for path in paths if is_unread(path))
    if not unread:
        return ''
    names = shortened(path.name for path in unread)
    examples: dict[str, str] = {}  # one for each command
    for path in unread:
        command = _CONVERTERS[path.suffix.lower()]
        examples.setdefault(command, command.format(shell.join(path.name), shell.join(path.stem)))
    return f'cannot read {names}; convert first, e.g. {", ".join(examples.values())}.'


def shortened(names: Iterable[str]) -> str:
    """The first three names, and the number of others."""
    first, others = (listed := list(names))[:3], listed[3:]
    return ', '.join(first) + (f' and {len(others)} more' if others else '')


def names_of_list(meta_info_file: str, key: str) -> list[str]:
    """Names of images from a meta-info file: one name per line, perhaps with spaces, optionally followed by the size.

    Raises:
        DataError: If the file cannot be read.
    """
    try:
        lines = Path(meta_info_file).read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{key}: {meta_info_file} cannot be read ({error}).') from None
    names = (re.match(r'(.+?\.\w+)(?:,? .*)?$', line.strip()) for line in lines)
    return [match[1] for match in names if match]


def check_lmdb(root: str, key: str) -> None:
    """Check that an LMDB is complete and contains all images of its meta_info.txt, without reading the images.

    Args:
        root (str): The LMDB.
        key (str): The option that names it.

    Raises:
        DataError: If a file is missing, truncated or not an LMDB, or a listed image is missing.
    """
    require(root, key)
    data = Path(root, 'data.mdb')
    try:
        environment = FileClient('lmdb', db_paths=root, client_keys='all').client._client['all']
    except lmdb.Error as error:
        raise DataError(f'{key}: {root} is not an LMDB, or is damaged ({error}).') from None
    # Reading a page beyond the end of the file would kill the process.
    if data.stat().st_size < (environment.info()['last_pgno'] + 1) * environment.stat()['psize']:
        raise DataError(f'{key}: {data} is truncated; copy it again, or recreate it with basicsr lmdb.')
    with environment.begin() as transaction, transaction.cursor() as cursor:
        lines = Path(root, 'meta_info.txt').read_text(encoding='utf-8').splitlines()
        for number, line in enumerate(lines, 1):
            name = line.split('.')[0]  # as in BasicSR
            if not name or not name.isascii() or not cursor.set_key(name.encode()):
                raise DataError(f'{key}: {root} has no image {name!r}, listed in line {number} of its meta_info.txt.')


def check_paired_keys(lq_root: str, gt_root: str, key: str) -> None:
    """Check that the LMDBs of LQ and GT have the same keys, as BasicSR's paired datasets require.

    Args:
        lq_root (str), gt_root (str): The LMDBs.
        key (str): The option section that names them.

    Raises:
        DataError: If they differ; names a key of each side, and the suffix to drop with ``basicsr lmdb --strip``.
    """
    lq, gt = (set(paths_from_lmdb(root)) for root in (lq_root, gt_root))
    if lq == gt:
        return
    lq_alone, gt_alone = sorted(lq - gt), sorted(gt - lq)
    endings = {name.removeprefix(stem) for name in lq_alone[:1] for stem in gt if name.startswith(stem)}
    for ending in sorted(endings):
        if all(name.endswith(ending) and name.removesuffix(ending) in gt for name in lq):
            raise DataError(
                f'{key}: keys of {lq_root} end in {ending!r}, those of {gt_root} do not ({lq_alone[0]!r}, '
                f'{lq_alone[0].removesuffix(ending)!r}); recreate it with basicsr lmdb FOLDER {lq_root} '
                f'--strip={ending} --overwrite.'
            )
    examples = [
        f'{root} contains {alone[0]!r}, which {other} lacks'
        for root, other, alone in ((lq_root, gt_root, lq_alone), (gt_root, lq_root, gt_alone))
        if alone
    ]
    raise DataError(f'{key}: {", and ".join(examples)}; recreate both from folders with the same file names.')


def lmdb_sizes(root: str) -> dict[str, tuple[int, int]]:
    """Sizes (height, width) by key, from an LMDB's meta_info.txt; skips lines of another form."""
    lines = (Path(root) / 'meta_info.txt').read_text(encoding='utf-8').splitlines()
    matches = (re.match(r'(.+?)\.\w+ \((\d+),(\d+),\d+\)', line) for line in lines)
    return {match[1]: (int(match[2]), int(match[3])) for match in matches if match}


def image_size(path: str) -> tuple[int, int]:
    """Height and width of an upright image, from its header.

    Raises:
        DataError: If the file is missing, not an image, or (PNG and JPEG) truncated.
    """
    return _read_header(path)[0]


def is_turned(path: str) -> bool:
    """Whether the EXIF header asks for the pixels to be rotated or flipped."""
    return _read_header(path)[1]


def upright(img: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and flip pixels ``(H, W, C)`` by an EXIF orientation, 1 to 8."""
    if orientation >= 5:
        img = img.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(img[::rows, ::columns])


def _read_header(path: str) -> tuple[tuple[int, int], bool]:
    """Height and width of the upright image, and whether its pixels must be rotated or flipped for that."""
    orientation = 1
    # Pillow raises many kinds of errors for broken headers, which OpenCV may still read.
    with contextlib.suppress(Exception), any_number_of_pixels(), Image.open(path) as image:
        if 'A' in image.getbands() or 'transparency' in image.info:
            _warn_of_alpha(str(Path(path).parent))
        chunks = _png_chunks(path) if image.format == 'PNG' else None
        # Without an eXIf chunk, Pillow would decode the whole PNG to look for an orientation.
        exif = {} if chunks and b'eXIf' not in chunks else image.getexif()
        given = exif.get(ExifTags.Base.Orientation)
        orientation = given if isinstance(given, int) and 1 <= given <= 8 else 1
        if chunks and b'IEND' in chunks and orientation == 1:
            return (image.height, image.width), False
        if image.format in ('JPEG', 'MPO') and _has_jpeg_end(path):
            size = (image.width, image.height) if orientation >= 5 else (image.height, image.width)
            return size, orientation > 1
    return read_image(path).shape[:2], orientation > 1


@contextlib.contextmanager
def any_number_of_pixels() -> Iterator[None]:
    """Disable Pillow's limit on the number of pixels, which reading a header does not need."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file with the same decoder as training.

    Args:
        path (str | Path): The file.

    Returns:
        ndarray: BGR uint8 ``(H, W, 3)``, upright.

    Raises:
        DataError: If the file is missing, damaged, truncated or not an image.
    """
    try:
        image = decode(Path(path).read_bytes())
    except OSError:
        image = None
    if image is None:
        raise DataError(f'{path}: cannot be read as an image; it is damaged, truncated or not an image.')
    return image


def decode(content: bytes | None) -> np.ndarray | None:
    """Decode an image with the decoder that training uses.

    Args:
        content (bytes | None): Content of the file or LMDB value; None if there is none.

    Returns:
        np.ndarray | None: uint8 ``(H, W, 3)``, BGR; None if it is damaged, truncated or not an image.
    """
    if not content:
        return None
    try:
        image = imfrombytes(content)
    except (cv2.error, TypeError, AttributeError):
        return None
    return None if image is None or _is_cut_jpeg(content) else image


def _png_chunks(path: str) -> set[bytes]:
    """Types of the complete chunks of a PNG file."""
    kinds = {b'IHDR'}
    with open(path, 'rb') as file:
        position, end = 8, os.path.getsize(path)
        while position + 12 <= end:
            file.seek(position)
            length, kind = struct.unpack('>I4s', file.read(8))
            position += 12 + length
            if position <= end:
                kinds.add(kind)
    return kinds


def _is_cut_jpeg(content: bytes) -> bool:
    """Whether a JPEG file is truncated; OpenCV fills the missing part with grey.

    Phones append data to the image, so the end marker need not be at the end of the file.
    """
    content = bytes(content)
    if not content.startswith(b'\xff\xd8') or _ends_as_jpeg(content[-64:]):
        return False
    file = io.BytesIO(content)
    try:
        # Unlike Image.open, this class accepts any number of pixels. It reads the headers only.
        with JpegImageFile(file) as image:
            if content.find(_JPEG_END, file.tell()) < 0:
                image.load()
    except Exception:
        return True
    return False


def _has_jpeg_end(path: str) -> bool:
    with open(path, 'rb') as file:
        file.seek(max(0, os.path.getsize(path) - 64))
        return _ends_as_jpeg(file.read())


def _ends_as_jpeg(end: bytes) -> bool:
    return end.rstrip(b'\0').endswith(_JPEG_END)


@functools.cache
def _warn_of_alpha(folder: str) -> None:
    print(f'basicsr: warning: {folder} has images with an alpha channel, which is dropped.', file=sys.stderr)


def check_pair_sizes(dataset: Any) -> None:
    """Check that every GT image of a paired dataset is ``scale`` times its LQ image.

    For validation and testing, GT may be larger by less than ``scale`` pixels, which BasicSR crops. For training, GT
    must not be smaller than ``gt_size``.

    Args:
        dataset (PairedImageDataset): A ``PairedImageDataset`` or a subclass, on folders or LMDBs.

    Raises:
        DataError: If a pair does not fit; names the first one and both sizes.
    """
    opt = dataset.opt
    scale, slack = opt['scale'], 0 if opt['phase'] == 'train' else opt['scale'] - 1
    smallest = opt.get('gt_size', 0) if opt['phase'] == 'train' else 0
    if opt['io_backend']['type'] == 'lmdb':
        sizes = {'lq': lmdb_sizes(opt['dataroot_lq']), 'gt': lmdb_sizes(opt['dataroot_gt'])}
    for path in dataset.paths:
        if opt['io_backend']['type'] == 'lmdb':
            lq, gt = (sizes[key].get(path[f'{key}_path']) for key in ('lq', 'gt'))
            if lq is None or gt is None:
                continue
        else:
            lq, gt = image_size(path['lq_path']), image_size(path['gt_path'])
        if not all(0 <= g - scale * s <= slack for g, s in zip(gt, lq, strict=True)):
            raise DataError(
                f'{path["lq_path"]}: LQ of {lq[1]}x{lq[0]} and GT of {gt[1]}x{gt[0]} ({path["gt_path"]}) '
                f"don't fit scale {scale}{'; are the folders swapped?' if lq[0] > gt[0] else '.'}"
            )
        if min(gt) < smallest:
            raise DataError(f'{path["gt_path"]}: {gt[1]}x{gt[0]} is smaller than gt_size {smallest}.')
