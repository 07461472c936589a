"""Reading and writing EXIF directories, with types and non-ASCII text unchanged (Pillow changes both)."""

from __future__ import annotations

import struct
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL.ExifTags import IFD, Base

# By tag: type and values (little-endian), or a sub-directory.
Directory: TypeAlias = dict[int, tuple[int, bytes] | dict]

HEADER = b'II*\0\x08\0\0\0'
BYTE, SHORT, LONG, RATIONAL, UNDEFINED = 1, 3, 4, 5, 7
# Bytes per number, by type, and numbers per value.
_NUMBERS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 1, 7: 1, 8: 2, 9: 4, 10: 4, 11: 4, 12: 8, 13: 4}
_PER_VALUE = {5: 2, 10: 2}
# Largest total size of values in a directory: entries may share bytes, so the file size is no limit.
_ROOM = 2**20
# Sub-directories by the tag of their parent (None: the first directory).
_SUB_DIRECTORIES: dict[int | None, tuple[IFD, ...]] = {None: (IFD.Exif, IFD.GPSInfo), IFD.Exif: (IFD.Interop,)}
# Tags of the first directory that describe the photograph rather than the storage of its pixels.
_DESCRIPTIVE = (
    *(Base.ImageDescription, Base.Make, Base.Model, Base.Software, Base.DateTime, Base.Artist, Base.HostComputer),
    *(Base.XResolution, Base.YResolution, Base.ResolutionUnit, Base.Rating, Base.RatingPercent, Base.Copyright),
    *(Base.XPTitle, Base.XPComment, Base.XPAuthor, Base.XPKeywords, Base.XPSubject, IFD.Exif, IFD.GPSInfo),
)


def read_exif(file: BinaryIO) -> Directory:
    """Read the tags that describe the photograph, without thumbnails, tags on pixel storage, and damaged values.

    Args:
        file (BinaryIO): EXIF from its TIFF header on, or a TIFF file (not BigTIFF).

    Raises:
        ValueError: If it is neither.
    """
    file.seek(0)
    header = file.read(8)
    order = {b'II*\0': '<', b'MM\0*': '>'}.get(header[:4])
    if order is None or len(header) < 8:
        raise ValueError('no TIFF header')
    return _read(file, struct.unpack(f'{order}I', header[4:])[0], order)


def _read(file: BinaryIO, offset: int, order: str, name: int | None = None) -> Directory:
    file.seek(offset)
    entries = file.read(12 * int.from_bytes(file.read(2), 'little' if order == '<' else 'big'))
    directory: Directory = {}
    room = _ROOM
    for i in range(0, len(entries) // 12 * 12, 12):
        tag, kind, count = struct.unpack(f'{order}HHI', entries[i : i + 8])
        number = _NUMBERS.get(kind, 0)
        size = number * count * _PER_VALUE.get(kind, 1)
        if size > room or (name is None and tag not in _DESCRIPTIVE):
            continue
        room -= size
        value, start = entries[i + 8 : i + 12], struct.unpack(f'{order}I', entries[i + 8 : i + 12])[0]
        if size > 4:
            file.seek(start)
            value = file.read(size)
        if tag in _SUB_DIRECTORIES.get(name, ()):
            directory[tag] = _read(file, start, order, tag)
        elif 0 < size <= len(value):
            directory[tag] = kind, np.frombuffer(value[:size], f'{order}u{number}').astype(f'<u{number}').tobytes()
    return directory


def exif_bytes(directory: Directory, offset: int = len(HEADER)) -> bytes:
    """A little-endian directory for an offset from the header; see :func:`entries_and_values`."""
    entries, values = entries_and_values(directory, offset)
    return struct.pack('<H', len(directory)) + b''.join(entries) + bytes(4) + values


def entries_and_values(directory: Directory, offset: int, others: int = 0) -> tuple[list[bytes], bytes]:
    """Entries of 12 bytes each, and the values that they point to.

    Args:
        directory (Directory): The directory.
        offset (int): Where the directory begins; values follow all entries.
        others (int): Number of other entries in the directory.
    """
    entries, values = [], b''
    start = offset + 2 + 12 * (len(directory) + others) + 4
    for tag, value in sorted(directory.items()):
        position = start + len(values)
        if isinstance(value, dict):
            values += exif_bytes(value, position)
            entries.append(struct.pack('<HHII', tag, LONG, 1, position))
        else:
            kind, content = value
            count = len(content) // (_NUMBERS[kind] * _PER_VALUE.get(kind, 1))
            if len(content) > 4:
                values += content
                content = struct.pack('<I', position)
            entries.append(struct.pack('<HHI4s', tag, kind, count, content))
        values += bytes(len(values) % 2)  # values begin at even offsets
    return entries, values


def resolution(dpi: tuple[float, float]) -> Directory:
    """A directory that contains only the resolution.

    Args:
        dpi (tuple[float, float]): Horizontal and vertical, in dots per inch.

    Returns:
        Directory: Empty if the resolution is not above 0, or too large for EXIF.
    """
    if not all(0 < value * 1000 < 2**32 - 1 for value in dpi):
        return {}
    directory: Directory = {
        tag: (RATIONAL, struct.pack('<II', round(value * 1000), 1000))
        for tag, value in zip((Base.XResolution, Base.YResolution), dpi, strict=True)
    }
    return {**directory, Base.ResolutionUnit: (SHORT, struct.pack('<H', 2))}


def of_upright(directory: Directory, height: int, width: int) -> Directory:
    """A directory for upright pixels of this size: orientation 1, and sizes updated if present."""
    if not directory:
        return {}
    exif = directory.get(IFD.Exif)
    if isinstance(exif, dict):
        sizes: Directory = {
            tag: (LONG, struct.pack('<I', value))
            for tag, value in ((Base.ExifImageWidth, width), (Base.ExifImageHeight, height))
            if tag in exif
        }
        directory = {**directory, IFD.Exif: {**exif, **sizes}}
    return {**directory, Base.Orientation: (SHORT, struct.pack('<H', 1))}
