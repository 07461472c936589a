"""Distortions: batched tensor functions, and the registry that option files choose them from.

A distortion is a function of images ``(B, C, H, W)`` in [0, 1], with one parameter value per image. Blurs act on the
GT grid; noise, compression and sharpening act on the LQ grid, where a camera applies them, too.
:mod:`drtl_plugin.tasks.library` builds auxiliary tasks from them.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from basicsr.utils import DiffJPEG, USMSharp
from basicsr.utils.img_process_util import filter2D
from basicsr.utils.registry import Registry
from torch import Tensor
from torch.nn import functional as F

DISTORTION_REGISTRY = Registry('distortion')
# Names that option files use in addition to those of the registry.
REDUCTION = 'bicubic'
COMPOSE = 'compose'
RANDOM_CAMERA = 'random_camera'


@dataclass(frozen=True)
class Drawn:
    """A parameter drawn uniformly for each image.

    Attributes:
        default (tuple[float, float]): Range used when the option file gives none.
        low, high (float): Smallest and largest value allowed.
    """

    default: tuple[float, float]
    low: float
    high: float


@dataclass(frozen=True)
class Distortion:
    """A distortion and its parameters; made by :func:`distortion`.

    Attributes:
        function (Callable): ``function(img, generator, **parameters) -> Tensor``.
        on_gt_grid (bool): Whether it acts before the reduction to the LQ grid.
        drawn (Mapping[str, Drawn]): Parameters drawn for each image.
        fixed (Mapping[str, int]): Integer parameters shared by all images, with their defaults.
    """

    function: Callable[..., Tensor]
    on_gt_grid: bool
    drawn: Mapping[str, Drawn]
    fixed: Mapping[str, int]

    @property
    def __name__(self) -> str:
        """The name in option files, under which BasicSR's ``Registry`` stores it."""
        return self.function.__name__

    def __call__(self, img: Tensor, generator: torch.Generator, *args: Tensor, **parameters: Tensor | int) -> Tensor:
        """Distort ``img`` ``(B, C, H, W)``; the other arguments are those of ``function``."""
        return self.function(img, generator, *args, **parameters)

    def __reduce__(self) -> tuple[Callable[[str, str], Any], tuple[str, str]]:
        # The function's name in its module refers to this object, so pickle would not find the function.
        return _import, (self.function.__module__, self.__name__)


def _import(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def distortion(on_gt_grid: bool, **drawn: Drawn) -> Callable[[Callable[..., Tensor]], Distortion]:
    """Describe a distortion function, for ``DISTORTION_REGISTRY``, which refuses a name that is taken.

    Args:
        on_gt_grid (bool): Whether it acts before the reduction.
        **drawn (Drawn): Parameters drawn for each image; each is passed as a Tensor ``(B,)``. Parameters with an
            integer default are shared by all images.

    Returns:
        Callable: Decorator that turns the function into a :class:`Distortion`.

    Raises:
        ValueError: If the function is named ``bicubic``, ``compose`` or ``random_camera``.

    Example::

        @DISTORTION_REGISTRY.register()
        @distortion(on_gt_grid=False, factor=Drawn((0.8, 1.2), 0, 4))
        def gain(img, generator, factor):
            return img * factor.view(-1, 1, 1, 1)
    """

    def describe(function: Callable[..., Tensor]) -> Distortion:
        if function.__name__ in (REDUCTION, COMPOSE, RANDOM_CAMERA):
            raise ValueError(f'a distortion cannot be named {function.__name__!r}; option files use that name already.')
        parameters = inspect.signature(function).parameters.values()
        fixed = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        return Distortion(function, on_gt_grid, drawn, fixed)

    return describe


def bicubic(img: Tensor, scale: int) -> Tensor:
    """Antialiased bicubic downsampling; equals MATLAB's ``imresize`` (a = -0.5) except at the border.

    Args:
        img (Tensor): ``(B, C, H, W)``; H and W are multiples of ``scale``.
        scale (int): Reduction factor.

    Returns:
        Tensor: ``(B, C, H / scale, W / scale)``, not clipped.
    """
    height, width = img.shape[-2:]
    return F.interpolate(img, size=(height // scale, width // scale), mode='bicubic', antialias=True)


def _blur(img: Tensor, kernel: Tensor) -> Tensor:
    """Filter each image with its kernel ``(B, k, k)``, float64, normalised to sum 1."""
    kernel = (kernel / kernel.sum((-2, -1), keepdim=True)).to(img)
    # Subnormal numbers in the tails of narrow kernels would slow the convolution down tenfold.
    kernel = kernel.masked_fill(kernel.abs() < 1e-30, 0)
    radius = kernel.shape[-1] // 2
    if min(img.shape[-2:]) <= radius:
        raise ValueError(f'an image of {tuple(img.shape[-2:])} is too small for a kernel of {2 * radius + 1} pixels.')
    return filter2D(img, kernel)


def _offsets(kernel_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y offsets of a kernel's pixels from its centre, ``(k, k)`` each, in float64 as in BasicSR.

    Kernels are built on the device of their parameters, so that nothing waits for a GPU.
    """
    axis = torch.arange(kernel_size, device=device, dtype=torch.float64) - kernel_size // 2
    y, x = torch.meshgrid(axis, axis, indexing='ij')
    return x, y


def _squared_distance(kernel_size: int, sigma_x: Tensor, sigma_y: Tensor, rotation: Tensor) -> Tensor:
    """``r²/σ²`` of a kernel's pixels, ``(B, k, k)``, along axes rotated by ``rotation``, each with its own sigma."""
    x, y = _offsets(kernel_size, sigma_x.device)
    sigma_x, sigma_y, rotation = (values.double().view(-1, 1, 1) for values in (sigma_x, sigma_y, rotation))
    along = x * rotation.cos() + y * rotation.sin()
    across = y * rotation.cos() - x * rotation.sin()
    return (along / sigma_x).square() + (across / sigma_y).square()


_SIGMA = Drawn((0.6, 2.0), 0.05, 20)
_ROTATION = Drawn((-math.pi, math.pi), -math.pi, math.pi)


@DISTORTION_REGISTRY.register()
@distortion(on_gt_grid=True, sigma=_SIGMA)
def gaussian_blur(img: Tensor, generator: torch.Generator, sigma: Tensor, kernel_size: int = 21) -> Tensor:
    """Isotropic Gaussian blur; ``sigma`` in pixels of ``img``."""
    return _blur(img, (-_squared_distance(kernel_size, sigma, sigma, torch.zeros_like(sigma)) / 2).exp())


@DISTORTION_REGISTRY.register()
@distortion(on_gt_grid=True, sigma_x=_SIGMA, sigma_y=_SIGMA, rotation=_ROTATION)
def anisotropic_blur(
    img: Tensor, generator: torch.Generator, sigma_x: Tensor, sigma_y: Tensor, rotation: Tensor, kernel_size: int = 21
) -> Tensor:
    """Anisotropic Gaussian blur; sigmas in pixels along axes rotated by ``rotation`` (radians)."""
    return _blur(img, (-_squared_distance(kernel_size, sigma_x, sigma_y, rotation) / 2).exp())


@DISTORTION_REGISTRY.register()
@distortion(on_gt_grid=True, sigma=_SIGMA, beta=Drawn((0.5, 4.0), 0.1, 8))
def generalized_blur(
    img: Tensor, generator: torch.Generator, sigma: Tensor, beta: Tensor, kernel_size: int = 21
) -> Tensor:
    """Generalised Gaussian blur ``exp(-(r²/σ²)^β / 2)``; β = 1 is :func:`gaussian_blur`."""
    distance = _squared_distance(kernel_size, sigma, sigma, torch.zeros_like(sigma))
    return _blur(img, (-(distance ** beta.double().view(-1, 1, 1)) / 2).exp())


@DISTORTION_REGISTRY.register()
@distortion(on_gt_grid=True, sigma=_SIGMA, beta=Drawn((1.0, 2.0), 0.1, 8))
def plateau_blur(img: Tensor, generator: torch.Generator, sigma: Tensor, beta: Tensor, kernel_size: int = 21) -> Tensor:
    """Plateau-shaped blur ``1 / (1 + (r²/σ²)^β)``, similar to that of a defocused lens."""
    distance = _squared_distance(kernel_size, sigma, sigma, torch.zeros_like(sigma))
    return _blur(img, 1 / (1 + distance ** beta.double().view(-1, 1, 1)))


@DISTORTION_REGISTRY.register()
@distortion(on_gt_grid=True, cutoff=Drawn((math.pi / 4, math.pi / 2), 0.1, math.pi))
def sinc(img: Tensor, generator: torch.Generator, cutoff: Tensor, kernel_size: int = 21) -> Tensor:
    """Ringing of an ideal low-pass filter ``c J1(c r) / r``; ``cutoff`` c in radians per pixel (Nyquist: π)."""
    x, y = _offsets(kernel_size, cutoff.device)
    radius = (x.square() + y.square()).sqrt()
    cutoff = cutoff.double().view(-1, 1, 1)
    centre = radius == 0
    ringing = torch.special.bessel_j1(cutoff * radius) / torch.where(centre, 1, radius)
    return _blur(img, torch.where(centre, cutoff / 2, ringing))


@DISTORTION_REGISTRY.register()
@distortion(on_gt_grid=False, sigma=Drawn((2.0, 15.0), 0, 255))
def gaussian_noise(img: Tensor, generator: torch.Generator, sigma: Tensor) -> Tensor:
    """White Gaussian noise, independent in each channel; ``sigma`` in 8-bit grey levels."""
    noise = torch.randn(img.shape, generator=generator, device=generator.device).to(img)
    return img + noise * sigma.view(-1, 1, 1, 1) / 255


@DISTORTION_REGISTRY.register()
@distortion(on_gt_grid=False, strength=Drawn((0.5, 2.0), 0, 20))
def poisson_noise(img: Tensor, generator: torch.Generator, strength: Tensor) -> Tensor:
    """Shot noise of variance ``strength² · img / 255``.

    Unlike BasicSR's, the noise level does not depend on how many grey levels an image has, so that a task means the
    same for any content.
    """
    rate = (img.clamp(0, 1) * 255).to(generator.device)
    noise = (torch.poisson(rate, generator=generator) - rate).to(img) / 255
    return img + noise * strength.view(-1, 1, 1, 1)


@DISTORTION_REGISTRY.register()
@distortion(on_gt_grid=False, quality=Drawn((40.0, 90.0), 1, 100))
def jpeg(img: Tensor, generator: torch.Generator, quality: Tensor) -> Tensor:
    """JPEG compression with chroma subsampling; ``quality`` from 1 to 100. Expects RGB.

    The image is padded to whole blocks by replicating its border, as encoders do (DiffJPEG would pad with black).
    """
    height, width = img.shape[-2:]
    padded = F.pad(img.clamp(0, 1), (0, -width % 16, 0, -height % 16), mode='replicate')
    # DiffJPEG computes this factor image by image, and divides 0 by 0 at quality 100.
    quality = quality.clamp(max=99.5)
    factor = torch.where(quality < 50, 5000 / quality, 200 - quality * 2) / 100
    jpeger = _jpeger(img.device)
    with torch.no_grad():
        compressed = jpeger.compress(padded, factor=factor)
        return jpeger.decompress(*compressed, *padded.shape[-2:], factor=factor)[..., :height, :width]


@functools.cache
def _jpeger(device: torch.device) -> DiffJPEG:
    """Cached, since building the tables takes longer than compressing a batch of patches."""
    # A copy: all DiffJPEGs share their tables, which .to() would move for all of them.
    return copy.deepcopy(DiffJPEG(differentiable=False)).to(device)


@DISTORTION_REGISTRY.register()
@distortion(on_gt_grid=False, weight=Drawn((0.3, 1.0), 0, 10))
def sharpen(img: Tensor, generator: torch.Generator, weight: Tensor, radius: int = 7, threshold: int = 2) -> Tensor:
    """Unsharp masking: adds ``weight`` times the detail that a Gaussian of ``radius`` pixels removes.

    Detail below ``threshold`` grey levels is left unchanged.
    """
    if min(img.shape[-2:]) <= radius // 2:
        raise ValueError(f'an image of {tuple(img.shape[-2:])} is too small for a radius of {radius} pixels.')
    return _sharpener(radius, img.device)(img, weight=weight.view(-1, 1, 1, 1), threshold=threshold)


@functools.cache
def _sharpener(radius: int, device: torch.device) -> USMSharp:
    return USMSharp(radius=radius).to(device)
