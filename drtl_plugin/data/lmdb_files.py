"""Conversion of image folders to LMDBs in the BasicSR layout."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

from basicsr.utils.lmdb_util import LmdbMaker, read_img_worker

from drtl_plugin.data.image_files import image_names, image_size, is_turned, read_image
from drtl_plugin.errors import DataError
from drtl_plugin.runtime.progress import progress


def check_lmdb_name(target: str | Path, overwrite: bool = False) -> None:
    """Raise DataError unless ``target`` is a valid name for a new LMDB, or an LMDB that may be replaced."""
    target = Path(target)
    if target.suffix != '.lmdb':
        raise DataError(f'lmdb: the name must end in .lmdb, got {target}.')
    if target.exists() and not (overwrite and (target / 'data.mdb').is_file()):
        hint = 'is not an LMDB; remove it' if overwrite else 'exists; use --overwrite'
        raise DataError(f'lmdb: {target} {hint} or choose another name.')


def write_lmdb(
    folder: str | Path, target: str | Path, strip: str = '', compress_level: int = 1, overwrite: bool = False
) -> int:
    """Convert a folder of images to an LMDB, which gets its name when it is complete.

    Args:
        folder (str | Path): Folder of the images; subfolders are ignored.
        target (str | Path): Name of the LMDB, ending in .lmdb.
        strip (str): Suffix to remove from keys, e.g. x4 for babyx4.png to get the key baby.
        compress_level (int): PNG compression of the values, 0 to 9.
        overwrite (bool): Whether to replace an LMDB of this name, once the new one is complete.

    Returns:
        int: Number of images.

    Raises:
        DataError: If the target exists, the folder contains no images, or an image cannot be a value or its name a key.
    """
    names = image_names(str(folder), 'folder')
    check_lmdb_name(target, overwrite)
    target = Path(target)
    keys = [Path(name).stem.removesuffix(strip) for name in names]
    for key, count in Counter(keys).items():
        if count > 1:
            raise DataError(f'folder: {folder} has more than one image named {key}; LMDB keys must differ.')
        if not key.isascii() or '.' in key:
            raise DataError(f'folder: {key} cannot be an LMDB key in the BasicSR layout; use ASCII names without dots.')
    for name in names:
        if is_turned(os.path.join(folder, name)):
            raise DataError(
                f'folder: {name} is rotated by its EXIF header, which an LMDB cannot store; save it upright.'
            )
    # Upper bound: 16-bit PNG files with alpha are the largest. The file stays as small as its content.
    sizes = [image_size(os.path.join(folder, name)) for name in names]
    map_size = sum(9 * height * width for height, width in sizes) + (1 << 24)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix='.lmdb_') as unfinished_root:
        unfinished = os.path.join(unfinished_root, 'unfinished.lmdb')
        paths = [os.path.join(folder, name) for name in names]
        _write_images(paths, keys, unfinished, compress_level, map_size)
        replaced = os.path.join(unfinished_root, 'replaced.lmdb')
        if target.exists():
            os.rename(target, replaced)
        try:
            os.rename(unfinished, target)
        except BaseException:
            if os.path.isdir(replaced):
                os.rename(replaced, target)
            raise
    return len(keys)


def _write_images(paths: list[str], keys: list[str], target: str, compress_level: int, map_size: int) -> None:
    maker = LmdbMaker(target, map_size, compress_level=compress_level)
    try:
        for path, key in progress(zip(paths, keys, strict=True), 'LMDB', len(paths), 'image'):
            try:
                _, content, shape = read_img_worker(path, key, compress_level)
            except AttributeError:  # OpenCV returned None
                read_image(path)  # names the file
                raise
            maker.put(content, key, shape)
    finally:
        maker.close()
