"""Photographs with their metadata: colour profile (ICC), EXIF and XMP."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageCms
from PIL.ExifTags import Base

from drtl_plugin.data.exif import (
    BYTE,
    HEADER,
    SHORT,
    UNDEFINED,
    Directory,
    entries_and_values,
    exif_bytes,
    of_upright,
    read_exif,
    resolution,
)
from drtl_plugin.data.image_files import any_number_of_pixels, upright
from drtl_plugin.errors import DataError

PROFILE, EXIF, XMP = 'colour profile', 'EXIF', 'XMP'
TIFF_SUFFIXES = ('.tif', '.tiff')
_EXTRA_SAMPLES, _XMP_TAG, _PROFILE_TAG = 338, 700, 34675
_UNASSOCIATED_ALPHA = struct.pack('<H', 2)
# Largest number of bytes in a JPEG segment, without its length, and in a part of a profile.
_SEGMENT, _PROFILE_PART = 65533, 65519
_XMP_ORIENTATION = re.compile(rb'(tiff:Orientation(?:\s*=\s*["\']|>)\s*)\d+')
# Sizes and thumbnails of the original, and a reference to more XMP elsewhere in a JPEG file.
_XMP_STALE = (
    *(b'exif:PixelXDimension', b'exif:PixelYDimension', b'tiff:ImageWidth', b'tiff:ImageLength'),
    *(b'xmp:Thumbnails', b'xmpNote:HasExtendedXMP'),
)
# XMP with these namespaces describes other images or videos in the file, which results do not have.
_XMP_CONTAINERS = (b'http://ns.google.com/photos/1.0/', b'http://ns.adobe.com/hdr-gain-map/')
# Profiles count as equal if colours differ by at most this many 8-bit levels.
_SAME = 2


@dataclass(frozen=True)
class Metadata:
    """The metadata of an image file.

    Attributes:
        profile (bytes | None): ICC profile.
        exif (Directory): EXIF tags that describe the photograph.
        xmp (bytes | None): XMP packet.
        lost (frozenset[str]): Kinds of metadata that could not be read or kept.
    """

    profile: bytes | None = None
    exif: Directory = field(default_factory=dict)
    xmp: bytes | None = None
    lost: frozenset[str] = frozenset()


def read_photograph(path: Path) -> tuple[np.ndarray, Metadata]:
    """Read an image with its metadata.

    CMYK images with a colour profile are converted to sRGB.

    Args:
        path (Path): The file.

    Returns:
        tuple[np.ndarray, Metadata]: ``(H, W, C)``, upright, uint8 or uint16; grey, BGR, or BGR with alpha.

    Raises:
        DataError: If the file is not an image, or has values other than 8 or 16 bits.
    """
    img, metadata, orientation = _by_pillow(path)
    if img is None:
        img = _by_opencv(path)
    if img.dtype not in (np.uint8, np.uint16):
        raise DataError(f'{path}: has {img.dtype} values; only 8-bit and 16-bit images are supported.')
    return upright(img[..., None] if img.ndim == 2 else img, orientation), metadata


def _by_opencv(path: Path) -> np.ndarray:
    try:
        content = np.fromfile(path, np.uint8)
        img = cv2.imdecode(content, cv2.IMREAD_UNCHANGED) if len(content) else None
    except (OSError, cv2.error):
        img = None
    if img is None:
        raise DataError(f'{path}: cannot be read as an image; it is damaged, truncated or not an image.')
    return img


def _by_pillow(path: Path) -> tuple[np.ndarray | None, Metadata, int]:
    """Pixels if OpenCV would decode them wrongly, metadata, and the EXIF orientation still to be applied."""
    img, metadata, orientation = None, Metadata(lost=frozenset({'unreadable metadata'})), 1
    # Pillow raises many kinds of errors for broken headers; OpenCV may still read the pixels.
    with contextlib.suppress(Exception), warnings.catch_warnings(), any_number_of_pixels(), open(path, 'rb') as file:
        warnings.simplefilter('ignore')
        image = Image.open(file)  # not by name: Pillow does not rotate TIFF files that it maps into memory
        metadata, orientation = _metadata(image, file)
        img, metadata = _special_pixels(image, metadata)
    return img, metadata, orientation


def _special_pixels(image: Image.Image, metadata: Metadata) -> tuple[np.ndarray | None, Metadata]:
    """Pixels of 8-bit images that OpenCV decodes wrongly: CMYK with a profile, TIFF with CMYK or alpha; else None."""
    is_tiff = image.format == 'TIFF'
    if is_tiff and max(image.tag_v2.get(Base.BitsPerSample, (1,))) > 8:  # type: ignore[attr-defined]
        return None, metadata
    if image.mode == 'CMYK' and colour_space(metadata.profile) == 'CMYK':
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB'))
        source = ImageCms.ImageCmsProfile(io.BytesIO(metadata.profile or b''))
        converted = ImageCms.profileToProfile(image, source, srgb, outputMode='RGB')
        metadata = replace(metadata, profile=srgb.tobytes())
    elif is_tiff and image.mode == 'CMYK':
        converted = image.convert('RGB')
    elif is_tiff and image.mode in ('LA', 'RGBA'):
        converted = image.convert('RGBA')
    else:
        return None, metadata
    rgb = np.asarray(converted)
    return cv2.cvtColor(rgb, cv2.COLOR_RGBA2BGRA if rgb.shape[-1] == 4 else cv2.COLOR_RGB2BGR), metadata


def _metadata(image: Image.Image, file: BinaryIO) -> tuple[Metadata, int]:
    """Metadata, and the EXIF orientation, 1 to 8, still to be applied to the decoded pixels."""
    if image.format == 'PNG':
        image.load()  # EXIF and XMP may follow the pixels
    xmp = image.info.get('xmp') or image.info.get('XML:com.adobe.xmp')
    if isinstance(xmp, str):
        xmp = xmp.encode()
    lost = set()
    if xmp and any(name in xmp for name in _XMP_CONTAINERS):
        xmp = None
        lost.add('XMP of gain maps, depth or video')
    exif: Directory = {}
    orientation = 1
    try:
        if image.format == 'TIFF':
            exif = read_exif(file)
        elif image.info.get('exif'):
            exif = read_exif(io.BytesIO(image.info['exif'].removeprefix(b'Exif\0\0')))
            orientation = image.getexif().get(Base.Orientation, 1)
    except Exception:  # many kinds, for broken headers
        lost.add(EXIF)
    if not exif and 'dpi' in image.info:
        exif = resolution(image.info['dpi'])
    metadata = Metadata(image.info.get('icc_profile'), exif, xmp, frozenset(lost))
    return metadata, orientation if orientation in range(1, 9) else 1


def colour_space(profile: bytes | None) -> str | None:
    """Colour space of an ICC profile, e.g. ``'RGB'``; None if there is no profile or it is damaged."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile or b'')).profile.xcolor_space.strip()
    except OSError:
        return None


def write_photograph(path: Path, img: np.ndarray, metadata: Metadata) -> set[str]:
    """Write an image with its metadata, atomically.

    Orientation, sizes and thumbnails in the metadata are updated or dropped.

    Args:
        path (Path): The file; its suffix chooses the format.
        img (np.ndarray): ``(H, W, C)``, upright, uint8 or uint16; grey, BGR, or BGR with alpha.
        metadata (Metadata): Metadata of the original.

    Returns:
        set[str]: Kinds of metadata that the format cannot store or that do not fit the pixels.

    Raises:
        DataError: If the file cannot be written.
    """
    lost = set(metadata.lost)
    blocks = {PROFILE: metadata.profile, XMP: metadata.xmp and _updated_xmp(metadata.xmp)}
    if metadata.profile and colour_space(metadata.profile) != ('GRAY' if img.shape[-1] == 1 else 'RGB'):
        blocks[PROFILE] = None
        lost.add(PROFILE)
    exif = of_upright(metadata.exif, *img.shape[:2])
    blocks[EXIF] = HEADER + exif_bytes(exif) if exif else None
    given = {kind: block for kind, block in blocks.items() if block}
    unfinished = path.with_name(f'.unfinished_{path.name}')
    try:
        lost |= _write(unfinished, img, given, exif)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return lost


def _write(path: Path, img: np.ndarray, blocks: Mapping[str, bytes], exif: Directory) -> set[str]:
    suffix = path.suffix.lower()
    if suffix in ('.png', '.webp'):
        kinds = {PROFILE: cv2.IMAGE_METADATA_ICCP, EXIF: cv2.IMAGE_METADATA_EXIF, XMP: cv2.IMAGE_METADATA_XMP}
        arrays = [np.frombuffer(block, np.uint8) for block in blocks.values()]
        done, lost = cv2.imwriteWithMetadata(str(path), img, [kinds[kind] for kind in blocks], arrays), set()
    else:
        done, lost = cv2.imwrite(str(path), img), set(blocks)
    if not done:
        raise DataError(f'{path.with_name(path.name.removeprefix(".unfinished_"))} cannot be written.')
    if suffix in ('.jpg', '.jpeg'):
        return _add_to_jpeg(path, blocks)
    if suffix in TIFF_SUFFIXES:
        tags: Directory = {**exif}
        if PROFILE in blocks:
            tags[_PROFILE_TAG] = UNDEFINED, blocks[PROFILE]
        if XMP in blocks:
            tags[_XMP_TAG] = BYTE, blocks[XMP]
        if img.shape[-1] == 4:
            tags[_EXTRA_SAMPLES] = SHORT, _UNASSOCIATED_ALPHA
        return set() if _add_to_tiff(path, tags) else lost
    return lost


def _updated_xmp(xmp: bytes) -> bytes:
    xmp = _XMP_ORIENTATION.sub(rb'\g<1>1', xmp)
    for name in _XMP_STALE:  # attributes, then elements; in linear time, since XMP is untrusted
        xmp = re.sub(rb'\s%b\s*=\s*(?:"[^"]*"|\'[^\']*\')' % name, b'', xmp)
        *elements, rest = xmp.split(b'</%b>' % name)
        xmp = b''.join(re.split(rb'<%b\b[^<>]*>' % name, element, maxsplit=1)[0] for element in elements) + rest
    return xmp


def _add_to_jpeg(path: Path, blocks: Mapping[str, bytes]) -> set[str]:
    """Insert segments into a JPEG file; returns the kinds of metadata that are too large."""
    segments = [
        (kind, marker, start + blocks[kind])
        for kind, marker, start in ((EXIF, 0xE1, b'Exif\0\0'), (XMP, 0xE1, b'http://ns.adobe.com/xap/1.0/\0'))
        if kind in blocks
    ]
    profile = blocks.get(PROFILE, b'')
    parts = [profile[start : start + _PROFILE_PART] for start in range(0, len(profile), _PROFILE_PART)]
    for i, part in enumerate(parts, 1):
        segments.append((PROFILE, 0xE2, b'ICC_PROFILE\0' + bytes([i, len(parts)]) + part))
    content = path.read_bytes()
    with open(path, 'wb') as file:
        start = 4 + int.from_bytes(content[4:6], 'big')  # after the JFIF segment, which OpenCV writes first
        file.write(content[:start])
        for _, marker, segment in segments:
            if len(segment) <= _SEGMENT:
                file.write(struct.pack('>BBH', 0xFF, marker, len(segment) + 2) + segment)
        file.write(memoryview(content)[start:])
    return {kind for kind, _, segment in segments if len(segment) > _SEGMENT}


def _add_to_tiff(path: Path, tags: Directory) -> bool:
    """Append a directory with more tags to a TIFF file; False for BigTIFF (above 4 GiB), which is left unchanged."""
    with open(path, 'r+b') as file:
        magic, first = struct.unpack('<4sI', file.read(8))
        if magic != HEADER[:4]:
            return False
        file.seek(first)
        own = [file.read(12) for _ in range(int.from_bytes(file.read(2), 'little'))]
        end = file.seek(0, os.SEEK_END)
        end += end % 2
        added, values = entries_and_values(tags, end, len(own))
        entries = sorted(own + added, key=lambda entry: int.from_bytes(entry[:2], 'little'))
        file.seek(end)
        file.write(struct.pack('<H', len(entries)) + b''.join(entries) + bytes(4) + values)
        file.seek(4)
        file.write(struct.pack('<I', end))
    return True


def require_same_profile(gt: Path, lq: Path) -> None:
    """Raise DataError unless the colour profiles of a pair are equivalent; images without a profile count as sRGB."""
    profiles = []
    for path in (gt, lq):
        profile = None
        with contextlib.suppress(Exception), any_number_of_pixels(), Image.open(path) as image:
            profile = image.info.get('icc_profile')
        profiles.append(profile)
    if profiles[0] == profiles[1]:
        return
    if any(profile and colour_space(profile) != 'RGB' for profile in profiles) or not _same_colours(profiles):
        names = [_profile_name(profile) for profile in profiles]
        raise DataError(
            f'--pairs: {gt} ({names[0]}) and {lq} ({names[1]}) have different colour profiles; convert both to the '
            'same one, e.g. sRGB: magick IN -profile sRGB.icc OUT.'
        )


def _same_colours(profiles: list[bytes | None]) -> bool:
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    first, second = (
        ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile('sRGB')
        for profile in profiles
    )
    try:
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        moved = ImageCms.profileToProfile(Image.fromarray(colours), first, second, intent)
    except ImageCms.PyCMSError:
        return False
    return bool(np.abs(np.asarray(moved, np.int16) - colours).max() <= _SAME)


def _profile_name(profile: bytes | None) -> str:
    if not profile:
        return 'no profile, i.e. sRGB'
    if colour_space(profile) is None:
        return 'a damaged profile'
    return (ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.profile_description or 'unnamed').strip()


def has_16_bits(path: Path) -> bool:
    """Whether a readable image file has more than 8 bits per channel."""
    return path.suffix.lower() in ('.png', *TIFF_SUFFIXES) and _by_opencv(path).dtype != np.uint8
