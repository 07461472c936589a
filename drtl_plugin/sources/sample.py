"""The sample data: photographs from scikit-image's wheel, and a simulated camera. Nothing is downloaded.

The camera has a lens, noise on a linear Bayer mosaic, demosaicing, a tone curve and JPEG. No auxiliary task equals it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import cv2
import numpy as np
import skimage
from basicsr.data.degradations import bivariate_plateau

from drtl_plugin.sources.layouts import SAMPLE_ROOT

SCALE = 4

# Photographs of the auxiliary tasks, the support set and the held-out set; the three are disjoint.
_AUXILIARY = (
    'motorcycle_left.png', 'motorcycle_right.png', 'hubble_deep_field.jpg', 'retina.jpg', 'ihc.png', 'brick.png',
    'grass.png', 'gravel.png', 'moon.png', 'coins.png', 'page.png', 'text.png',
)  # fmt: skip
# Crops of 224 pixels: file, top, left.
_SUPPORT = (
    ('astronaut.png', 0, 130),
    ('astronaut.png', 256, 20),
    ('astronaut.png', 256, 270),
    ('rocket.jpg', 0, 200),
    ('rocket.jpg', 200, 330),
)
_SUPPORT_SIZE = 224
_HELD_OUT = ('chelsea.png', 'coffee.png', 'camera.png')


def simulate_camera(
    gt: np.ndarray, rng: np.random.Generator, scale: int = SCALE, noise: float = 1.0, quality: int = 85
) -> np.ndarray:
    """Photograph a scene with the sample camera.

    Lens (plateau-shaped point spread, wider for red and blue), sensor (Bayer mosaic of linear light with
    Poisson-Gaussian noise), demosaicing, tone curve (sRGB's exponent, 2.2), JPEG.

    Args:
        gt (np.ndarray): The scene, ``(H, W, 3)`` uint8, BGR; H and W are multiples of ``2 * scale``.
        rng (np.random.Generator): Source of the noise.
        scale (int): Reduction factor.
        noise (float): Factor of the standard deviation of the sensor noise.
        quality (int): JPEG quality, 1 to 100.

    Returns:
        np.ndarray: ``(H / scale, W / scale, 3)`` uint8, BGR.
    """
    linear = (gt.astype(np.float32) / 255) ** 2.2
    channels = []
    for channel, width in zip(
        cv2.split(linear), (0.40, 0.32, 0.36), strict=True
    ):  # blue, green, red: chromatic aberration
        kernel = bivariate_plateau(21, width * scale, width * scale, 0, 1.6).astype(np.float32)
        channels.append(cv2.filter2D(channel, -1, kernel, borderType=cv2.BORDER_REFLECT_101))
    height, width = gt.shape[0] // scale, gt.shape[1] // scale
    light = cv2.resize(cv2.merge(channels), (width, height), interpolation=cv2.INTER_AREA)

    mosaic = np.empty((height, width), np.float32)  # rows BG BG, GR GR
    mosaic[0::2, 0::2] = light[0::2, 0::2, 0]
    mosaic[0::2, 1::2] = light[0::2, 1::2, 1]
    mosaic[1::2, 0::2] = light[1::2, 0::2, 1]
    mosaic[1::2, 1::2] = light[1::2, 1::2, 2]
    shot, read = 4e-4 * noise**2, 4e-6 * noise**2
    mosaic = mosaic + rng.standard_normal(mosaic.shape, np.float32) * np.sqrt(shot * mosaic + read)
    # OpenCV names Bayer patterns by the second row and column; this is its BayerRG.
    raw = (np.clip(mosaic, 0, 1) * 65535).round().astype(np.uint16)
    demosaiced = cv2.cvtColor(raw, cv2.COLOR_BayerRG2BGR).astype(np.float32) / 65535

    photograph = (demosaiced ** (1 / 2.2) * 255).round().clip(0, 255).astype(np.uint8)
    encoded = cv2.imencode('.jpg', photograph, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return _decode(encoded)


def prepare_sample_data(root: str | Path = SAMPLE_ROOT) -> Path:
    """Write the sample data, unless it exists.

    Args:
        root (str | Path): Folder to write: ``auxiliary/``, ``camera/support/{gt,lq}/``, ``camera/val/{gt,lq}/``. It
            gets this name when it is complete.

    Returns:
        Path: ``root``.
    """
    root = Path(root)
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix='.drtl_sample_') as unfinished:
        _write(Path(unfinished, 'complete'))
        Path(unfinished, 'complete').rename(root)
    return root


def _write(root: Path) -> None:
    source = Path(skimage.__file__).parent / 'data'
    for name in _AUXILIARY:
        _save(root / 'auxiliary' / f'{Path(name).stem}.png', _read(source / name))
    crops = [
        (f'{i}_{Path(name).stem}', _read(source / name)[top : top + _SUPPORT_SIZE, left : left + _SUPPORT_SIZE])
        for i, (name, top, left) in enumerate(_SUPPORT, 1)
    ]
    held_out = [(Path(name).stem, _read(source / name)) for name in _HELD_OUT]
    rng = np.random.default_rng(2111_13078)
    for split, scenes in (('support', crops), ('val', held_out)):
        for name, scene in scenes:
            height, width = (extent - extent % (2 * SCALE) for extent in scene.shape[:2])
            gt = scene[:height, :width]
            _save(root / 'camera' / split / 'gt' / f'{name}.png', gt)
            _save(root / 'camera' / split / 'lq' / f'{name}.png', simulate_camera(gt, rng))


def _read(path: Path) -> np.ndarray:
    # From bytes, since OpenCV cannot open every path.
    return _decode(np.frombuffer(path.read_bytes(), np.uint8))


def _decode(content: np.ndarray) -> np.ndarray:
    image = cv2.imdecode(content, cv2.IMREAD_COLOR)
    assert image is not None  # scikit-image's files, or OpenCV's own
    return image


def _save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode('.png', image)[1].tobytes())
