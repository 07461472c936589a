"""Auxiliary distortions: batched tensor functions, a registry of them by name, and the tasks built from them.

A *distortion* is a function on images ``(B, C, H, W)`` in [0, 1] with one parameter value per image. A *task* is a
sequence of distortions with ranges for their parameters; it turns ground truth into low-quality images of
``1 / scale`` the size. Blurs act on the ground truth's grid; the reduction (``bicubic``) follows; noise, compression
and sharpening act on the grid of the low-quality image, as they do in a camera.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from basicsr.utils import DiffJPEG, USMSharp
from basicsr.utils.img_process_util import filter2D
from torch import Tensor
from torch.nn import functional as F

from drtl_plugin.errors import OptionError, unknown


@dataclass(frozen=True)
class Drawn:
    """A parameter that is drawn anew for each image.

    Attributes:
        default (tuple[float, float]): Range that is drawn from, uniformly, where the option file gives none.
        low, high (float): The values that make sense.
    """

    default: tuple[float, float]
    low: float
    high: float


@dataclass(frozen=True)
class Distortion:
    """An entry of the registry; made by :func:`distortion`.

    Attributes:
        name (str): Name in option files.
        function (Callable): ``function(img, generator, **parameters) -> Tensor``.
        on_gt_grid (bool): Whether it acts before the reduction to the low-quality grid.
        drawn (Mapping[str, Drawn]): The parameters that are drawn per image.
        fixed (Mapping[str, int]): The whole-number parameters that are the same for all images, with defaults.
    """

    name: str
    function: Callable[..., Tensor]
    on_gt_grid: bool
    drawn: Mapping[str, Drawn]
    fixed: Mapping[str, int]


DISTORTIONS: dict[str, Distortion] = {}
REDUCTION = 'bicubic'
COMPOSE = 'compose'


def distortion(on_gt_grid: bool, **drawn: Drawn) -> Callable[[Callable], Callable]:
    """Register a function as the distortion of its name.

    Args:
        on_gt_grid (bool): Whether it acts before the reduction.
        **drawn (Drawn): Its parameters that are drawn per image; each arrives as a Tensor ``(B,)``. Keyword
            parameters with whole-number defaults are fixed ones.

    Example::

        @distortion(on_gt_grid=False, factor=Drawn((0.8, 1.2), 0, 4))
        def gain(img, generator, factor):
            return img * factor.view(-1, 1, 1, 1)
    """

    def register(function: Callable) -> Callable:
        name = function.__name__
        if name in DISTORTIONS or name in (REDUCTION, COMPOSE):
            raise ValueError(f'a distortion named {name!r} exists already.')
        parameters = inspect.signature(function).parameters.values()
        fixed = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        DISTORTIONS[name] = Distortion(name, function, on_gt_grid, drawn, fixed)
        return function

    return register


def bicubic(img: Tensor, scale: int) -> Tensor:
    """Antialiased bicubic reduction, MATLAB's ``imresize`` (a = -0.5) but for the outermost pixels.

    Args:
        img (Tensor): ``(B, C, H, W)``; H and W are multiples of ``scale``.
        scale (int): Reduction factor.

    Returns:
        Tensor: ``(B, C, H / scale, W / scale)``, not clipped.
    """
    height, width = img.shape[-2:]
    return F.interpolate(img, size=(height // scale, width // scale), mode='bicubic', antialias=True)


def _blur(img: Tensor, kernel: Tensor) -> Tensor:
    """Filter each image by its kernel, ``(B, k, k)`` in double precision, scaled to sum 1."""
    kernel = (kernel / kernel.sum((-2, -1), keepdim=True)).to(img)
    # Far tails of narrow kernels are subnormal numbers, which add nothing and slow a convolution down tenfold.
    kernel = kernel.masked_fill(kernel.abs() < 1e-30, 0)
    radius = kernel.shape[-1] // 2
    if min(img.shape[-2:]) <= radius:
        raise ValueError(f'an image of {tuple(img.shape[-2:])} is too small for a kernel of {2 * radius + 1} pixels.')
    return filter2D(img, kernel)


def _offsets(kernel_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y of a kernel's pixels from its centre, ``(k, k)``, in double precision as BasicSR computes kernels.

    Kernels are made on the device that their parameters are on: a GPU is not waited for to tell them.
    """
    axis = torch.arange(kernel_size, device=device, dtype=torch.float64) - kernel_size // 2
    y, x = torch.meshgrid(axis, axis, indexing='ij')
    return x, y


def _squared_distance(kernel_size: int, sigma_x: Tensor, sigma_y: Tensor, rotation: Tensor) -> Tensor:
    """``r²/σ²`` of a kernel's pixels, ``(B, k, k)``: along axes that are turned by ``rotation``, each by its sigma."""
    x, y = _offsets(kernel_size, sigma_x.device)
    sigma_x, sigma_y, rotation = (values.double().view(-1, 1, 1) for values in (sigma_x, sigma_y, rotation))
    along = x * rotation.cos() + y * rotation.sin()
    across = y * rotation.cos() - x * rotation.sin()
    return (along / sigma_x).square() + (across / sigma_y).square()


_SIGMA = Drawn((0.6, 2.0), 0.05, 20)
_ROTATION = Drawn((-math.pi, math.pi), -math.pi, math.pi)


@distortion(on_gt_grid=True, sigma=_SIGMA)
def gaussian_blur(img: Tensor, generator: torch.Generator, sigma: Tensor, kernel_size: int = 21) -> Tensor:
    """Isotropic Gaussian blur; ``sigma`` in pixels of ``img``."""
    return _blur(img, (-_squared_distance(kernel_size, sigma, sigma, torch.zeros_like(sigma)) / 2).exp())


@distortion(on_gt_grid=True, sigma_x=_SIGMA, sigma_y=_SIGMA, rotation=_ROTATION)
def anisotropic_blur(
    img: Tensor, generator: torch.Generator, sigma_x: Tensor, sigma_y: Tensor, rotation: Tensor, kernel_size: int = 21
) -> Tensor:
    """Anisotropic Gaussian blur; sigmas in pixels along the axes, which are turned by ``rotation`` (radian)."""
    return _blur(img, (-_squared_distance(kernel_size, sigma_x, sigma_y, rotation) / 2).exp())


@distortion(on_gt_grid=True, sigma=_SIGMA, beta=Drawn((0.5, 4.0), 0.1, 8))
def generalized_blur(
    img: Tensor, generator: torch.Generator, sigma: Tensor, beta: Tensor, kernel_size: int = 21
) -> Tensor:
    """Generalised Gaussian blur ``exp(-(r²/σ²)^β / 2)``; β = 1 is :func:`gaussian_blur`."""
    distance = _squared_distance(kernel_size, sigma, sigma, torch.zeros_like(sigma))
    return _blur(img, (-(distance ** beta.double().view(-1, 1, 1)) / 2).exp())


@distortion(on_gt_grid=True, sigma=_SIGMA, beta=Drawn((1.0, 2.0), 0.1, 8))
def plateau_blur(img: Tensor, generator: torch.Generator, sigma: Tensor, beta: Tensor, kernel_size: int = 21) -> Tensor:
    """Plateau-shaped blur ``1 / (1 + (r²/σ²)^β)``, near to a defocused lens."""
    distance = _squared_distance(kernel_size, sigma, sigma, torch.zeros_like(sigma))
    return _blur(img, 1 / (1 + distance ** beta.double().view(-1, 1, 1)))


@distortion(on_gt_grid=True, cutoff=Drawn((math.pi / 4, math.pi / 2), 0.1, math.pi))
def sinc(img: Tensor, generator: torch.Generator, cutoff: Tensor, kernel_size: int = 21) -> Tensor:
    """Ringing of an ideal low-pass filter ``c J1(c r) / r``; ``cutoff`` c in radian a pixel (π is Nyquist's)."""
    x, y = _offsets(kernel_size, cutoff.device)
    radius = (x.square() + y.square()).sqrt()
    cutoff = cutoff.double().view(-1, 1, 1)
    centre = radius == 0
    ringing = torch.special.bessel_j1(cutoff * radius) / torch.where(centre, 1, radius)
    return _blur(img, torch.where(centre, cutoff / 2, ringing))


@distortion(on_gt_grid=False, sigma=Drawn((2.0, 15.0), 0, 255))
def gaussian_noise(img: Tensor, generator: torch.Generator, sigma: Tensor) -> Tensor:
    """White Gaussian noise, independent in each channel; ``sigma`` in grey levels (of 255)."""
    noise = torch.randn(img.shape, generator=generator, device=generator.device).to(img)
    return img + noise * sigma.view(-1, 1, 1, 1) / 255


@distortion(on_gt_grid=False, strength=Drawn((0.5, 2.0), 0, 20))
def poisson_noise(img: Tensor, generator: torch.Generator, strength: Tensor) -> Tensor:
    """Shot noise of variance ``strength² · img / 255``.

    BasicSR's own counts the grey levels of an image to set its level; here the level is a parameter alone, so that
    a task means the same for every content.
    """
    rate = (img.clamp(0, 1) * 255).to(generator.device)
    noise = (torch.poisson(rate, generator=generator) - rate).to(img) / 255
    return img + noise * strength.view(-1, 1, 1, 1)


@distortion(on_gt_grid=False, quality=Drawn((40.0, 90.0), 1, 100))
def jpeg(img: Tensor, generator: torch.Generator, quality: Tensor) -> Tensor:
    """JPEG compression with chroma subsampling; ``quality`` from 1 to 100. Expects RGB.

    The image is continued by its border to whole blocks first, as encoders do (DiffJPEG would pad with black).
    """
    height, width = img.shape[-2:]
    padded = F.pad(img.clamp(0, 1), (0, -width % 16, 0, -height % 16), mode='replicate')
    # DiffJPEG's own way to this factor asks for each image's quality by itself, and divides 0 by 0 at 100.
    quality = quality.clamp(max=99.5)
    factor = torch.where(quality < 50, 5000 / quality, 200 - quality * 2) / 100
    jpeger = _jpeger(img.device)
    with torch.no_grad():
        compressed = jpeger.compress(padded, factor=factor)
        return jpeger.decompress(*compressed, *padded.shape[-2:], factor=factor)[..., :height, :width]


@functools.cache
def _jpeger(device: torch.device) -> DiffJPEG:
    """Building its tables takes longer than compressing a batch of patches."""
    # A copy: the tables of all DiffJPEGs are the same objects, and would all be moved.
    return copy.deepcopy(DiffJPEG(differentiable=False)).to(device)


@distortion(on_gt_grid=False, weight=Drawn((0.3, 1.0), 0, 10))
def sharpen(img: Tensor, generator: torch.Generator, weight: Tensor, radius: int = 7, threshold: int = 2) -> Tensor:
    """Unsharp masking: ``weight`` of the detail finer than a Gaussian of ``radius`` pixels is added.

    Detail below ``threshold`` grey levels is left as it is.
    """
    if min(img.shape[-2:]) <= radius // 2:
        raise ValueError(f'an image of {tuple(img.shape[-2:])} is too small for a radius of {radius} pixels.')
    return _sharpener(radius, img.device)(img, weight=weight.view(-1, 1, 1, 1), threshold=threshold)


@functools.cache
def _sharpener(radius: int, device: torch.device) -> USMSharp:
    return USMSharp(radius=radius).to(device)


@dataclass(frozen=True)
class Step:
    """One distortion of a task, with the ranges of its drawn parameters; ``kind`` None stands for the reduction."""

    kind: Distortion | None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)

    def label(self) -> str:
        """Name and ranges in short, e.g. ``gaussian_blur(sigma 0.6-1)``."""
        if self.kind is None:
            return REDUCTION
        given = [f'{key} {low:g}-{high:g}' for key, (low, high) in self.ranges.items()]
        return f'{self.kind.name}({", ".join(given)})'


@dataclass(frozen=True)
class DistortionTask:
    """An auxiliary task: distortions in order, around one reduction by ``scale``."""

    label: str
    steps: tuple[Step, ...]
    scale: int

    def __call__(self, gt: Tensor, generator: torch.Generator) -> Tensor:
        """Distort ground truth.

        Args:
            gt (Tensor): ``(B, 3, H, W)``, RGB in [0, 1]; H and W are multiples of the scale.
            generator (torch.Generator): Source of parameters and noise; the result is a function of its state.

        Returns:
            Tensor: ``(B, 3, H / scale, W / scale)`` in [0, 1], rounded to 8 bits as a file would be.

        Raises:
            ValueError: If H or W is no multiple of the scale, or smaller than a kernel.
        """
        if gt.shape[-1] % self.scale or gt.shape[-2] % self.scale:
            raise ValueError(f'an image of {tuple(gt.shape[-2:])} is no multiple of the scale {self.scale}.')
        img = gt
        for step in self.steps:
            if step.kind is None:
                img = bicubic(img, self.scale)
                continue
            drawn = {
                key: (low + (high - low) * torch.rand(len(img), generator=generator, device=generator.device)).to(img)
                for key, (low, high) in step.ranges.items()
            }
            img = step.kind.function(img, generator, **drawn, **step.fixed)
        return (img * 255).round().clamp(0, 255) / 255


class DistortionLibrary:
    """The auxiliary tasks of an option file.

    Args:
        distortions (str | list[dict]): ``'default'`` (:func:`default_library`), or a list whose entries have
            ``name`` (a registered distortion, ``bicubic`` or ``compose``), its parameters (``[low, high]`` or one
            number), and optionally ``label``. ``compose`` has ``steps``: a list of such entries, applied in order;
            the reduction stands where ``bicubic`` is named, else in front of the first step that acts on the
            low-quality grid.
        scale (int): Reduction factor of all tasks.
        where (str): Key in the option file, for messages.

    Raises:
        OptionError: Unknown distortion or parameter, range out of bounds, equal labels, no tasks.

    Example::

        library = DistortionLibrary([{'name': 'gaussian_blur', 'sigma': [0.6, 1.0]}, {'name': 'bicubic'}], scale=4)
        lq = library.tasks[0](gt, torch.Generator().manual_seed(0))
    """

    def __init__(self, distortions: Any, scale: int, where: str = 'datasets.train.distortions') -> None:
        if distortions == 'default':
            distortions = default_library(scale)
        if not isinstance(distortions, list) or not distortions:
            raise OptionError(f"{where}: expected 'default' or a list of distortions, got {distortions!r}.")
        self.tasks = tuple(_parse_task(entry, scale, f'{where}[{i}]') for i, entry in enumerate(distortions))
        self.scale = scale
        labels = self.labels
        for label in labels:
            if labels.count(label) > 1:
                raise OptionError(f'{where}: two tasks are both {label!r}; give one of them a label of its own.')

    def __len__(self) -> int:
        return len(self.tasks)

    def with_task(self, task: Any) -> DistortionLibrary:
        """This library and one more task: a callable as :class:`DistortionTask`, with a label.

        Raises:
            OptionError: If a task of that label is there already.
        """
        if task.label in self.labels:
            raise OptionError(f'datasets.train.distortions: a task is labelled {task.label!r}; give it another label.')
        extended = copy.copy(self)
        extended.tasks = (*self.tasks, task)
        return extended

    @property
    def labels(self) -> list[str]:
        """The tasks' names, unique and in order."""
        return [task.label for task in self.tasks]


def _parse_task(entry: Any, scale: int, where: str) -> DistortionTask:
    if not isinstance(entry, dict) or 'name' not in entry:
        raise OptionError(f'{where}: expected a section with a name, e.g. {{name: gaussian_blur, sigma: [0.6, 1.0]}}.')
    entry = dict(entry)
    label = entry.pop('label', None)
    if entry['name'] == COMPOSE:
        parts = entry.get('steps')
        if set(entry) != {'name', 'steps'} or not isinstance(parts, list) or not parts:
            raise OptionError(f'{where}: compose takes steps, a list of distortions, and nothing else.')
        steps = [_parse_step(part, f'{where}.steps[{i}]') for i, part in enumerate(parts)]
    else:
        steps = [_parse_step(entry, where)]
    reductions = sum(step.kind is None for step in steps)
    if reductions > 1:
        raise OptionError(f'{where}: {REDUCTION} stands more than once.')
    if not reductions:
        first_lq = next((i for i, step in enumerate(steps) if step.kind and not step.kind.on_gt_grid), len(steps))
        steps.insert(first_lq, Step(None))
    if label is None:
        label = ' + '.join(step.label() for step in steps if step.kind is not None) or REDUCTION
    return DistortionTask(str(label), tuple(steps), scale)


def _parse_step(entry: Any, where: str) -> Step:
    if not isinstance(entry, dict) or 'name' not in entry:
        raise OptionError(f'{where}: expected a section with a name, e.g. {{name: jpeg, quality: [50, 80]}}.')
    given = {key: value for key, value in entry.items() if key != 'name'}
    name = entry['name']
    if name == REDUCTION and not given:
        return Step(None)
    if name not in DISTORTIONS:
        raise unknown('distortion', name, [*DISTORTIONS, REDUCTION, COMPOSE], where)
    kind = DISTORTIONS[name]
    for key in given:
        if key not in kind.drawn and key not in kind.fixed:
            raise unknown(f'parameter of {name}', key, [*kind.drawn, *kind.fixed], where)
    ranges = {
        key: _parse_range(given[key], drawn, f'{where}.{key}') if key in given else drawn.default
        for key, drawn in kind.drawn.items()
    }
    fixed = {**kind.fixed, **{key: given[key] for key in kind.fixed if key in given}}
    for key, value in fixed.items():
        odd = key == 'kernel_size'
        if not isinstance(value, int) or value < 1 or (odd and value % 2 == 0):
            raise OptionError(
                f'{where}.{key}: expected {"an odd" if odd else "a"} whole number above 0, got {value!r}.'
            )
    return Step(kind, ranges, fixed)


def _parse_range(value: Any, drawn: Drawn, where: str) -> tuple[float, float]:
    try:
        low, high = (float(v) for v in (value if isinstance(value, (list, tuple)) else (value, value)))
    except (TypeError, ValueError):
        raise OptionError(f'{where}: expected a number or [low, high], got {value!r}.') from None
    if not drawn.low <= low <= high <= drawn.high:
        raise OptionError(f'{where}: {value} must be a range within [{drawn.low:g}, {drawn.high:g}].')
    return low, high


def default_library(scale: int) -> list[dict]:
    """The shipped auxiliary tasks: blur × noise × compression in even steps, and five of other kinds.

    Args:
        scale (int): Reduction factor; blur widths grow with it, since a pixel of the low-quality image does.

    Returns:
        list[dict]: Entries as in an option file; 17 tasks.
    """
    blurs = {'sharp': None, 'soft': [0.2 * scale, 0.4 * scale], 'blurred': [0.5 * scale, 0.75 * scale]}
    kernel_size = max(21, 2 * math.ceil(2.25 * scale) + 1)  # three times the widest sigma
    noises = {'clean': None, 'noisy': [4, 16]}
    qualities = {'raw': None, 'jpeg': [40, 85]}
    entries = []
    for blur, sigma in blurs.items():
        for noise, level in noises.items():
            for compression, quality in qualities.items():
                blurred = {'name': 'gaussian_blur', 'sigma': sigma, 'kernel_size': kernel_size}
                steps: list[dict] = [blurred] if sigma else []
                steps.append({'name': REDUCTION})
                if level:
                    steps.append({'name': 'gaussian_noise', 'sigma': level})
                if quality:
                    steps.append({'name': 'jpeg', 'quality': quality})
                entries.append({'name': COMPOSE, 'label': f'{blur} {noise} {compression}', 'steps': steps})
    wide = [0.15 * scale, 0.75 * scale]
    others: list[dict] = [
        {'name': 'anisotropic_blur', 'sigma_x': wide, 'sigma_y': wide, 'kernel_size': kernel_size},
        {'name': 'plateau_blur', 'sigma': [0.2 * scale, 0.6 * scale], 'kernel_size': kernel_size},
        {'name': 'sinc', 'cutoff': [0.8 * math.pi / scale, min(1.6 / scale, 1) * math.pi], 'kernel_size': kernel_size},
        {'name': 'poisson_noise'},
        {'name': 'sharpen'},
    ]
    return entries + [{**entry, 'label': entry['name'].replace('_', ' ')} for entry in others]
