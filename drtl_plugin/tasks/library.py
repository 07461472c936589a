"""Auxiliary tasks: sequences of distortions with parameter ranges, and the library of an option file.

A task turns GT into LQ images of ``1 / scale`` the size: blurs act on the GT grid, then comes downsampling
(``bicubic``), then the distortions on the LQ grid.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from drtl_plugin.errors import OptionError, unknown
from drtl_plugin.tasks.distortions import (
    COMPOSE,
    DISTORTION_REGISTRY,
    RANDOM_CAMERA,
    REDUCTION,
    Distortion,
    Drawn,
    bicubic,
)
from drtl_plugin.tasks.random_camera import random_composition


class Task(Protocol):
    """An auxiliary task: a :class:`DistortionTask`, a camera fit, or anything else of this shape."""

    @property
    def label(self) -> str:
        """Name, unique in a library."""

    def __call__(self, gt: Tensor, generator: torch.Generator) -> Tensor:
        """Turn GT ``(B, 3, H, W)`` in [0, 1] into LQ ``(B, 3, H / scale, W / scale)`` in [0, 1]."""


@dataclass(frozen=True)
class Step:
    """One distortion of a task and the ranges of its drawn parameters; ``kind`` is None for the reduction."""

    kind: Distortion | None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)

    def label(self) -> str:
        """Name and ranges, e.g. ``gaussian_blur(sigma 0.6-1)``."""
        if self.kind is None:
            return REDUCTION
        given = [f'{key} {low:g}-{high:g}' for key, (low, high) in self.ranges.items()]
        return f'{self.kind.__name__}({", ".join(given)})'


@dataclass(frozen=True)
class DistortionTask:
    """An auxiliary task: distortions in order, with one reduction by ``scale`` among them."""

    label: str
    steps: tuple[Step, ...]
    scale: int

    def __call__(self, gt: Tensor, generator: torch.Generator) -> Tensor:
        """Distort ground truth.

        Args:
            gt (Tensor): ``(B, 3, H, W)``, RGB in [0, 1]; H and W are multiples of the scale.
            generator (torch.Generator): Source of parameters and noise; its state determines the result.

        Returns:
            Tensor: ``(B, 3, H / scale, W / scale)`` in [0, 1], rounded to 8 bits as in a file.

        Raises:
            ValueError: If H or W is not a multiple of the scale, or smaller than a kernel.
        """
        if gt.shape[-1] % self.scale or gt.shape[-2] % self.scale:
            raise ValueError(f'an image of {tuple(gt.shape[-2:])} is not a multiple of scale {self.scale}.')
        img = gt
        for step in self.steps:
            if step.kind is None:
                img = bicubic(img, self.scale)
                continue
            drawn = {
                key: (low + (high - low) * torch.rand(len(img), generator=generator, device=generator.device)).to(img)
                for key, (low, high) in step.ranges.items()
            }
            img = step.kind(img, generator, **drawn, **step.fixed)
        return (img * 255).round().clamp(0, 255) / 255


@dataclass(frozen=True)
class RandomCamera:
    """An auxiliary task that draws a new camera for each episode (ours), the same for all images of the episode.

    Meta-learning on such episodes learns to adapt to a camera.
    """

    label: str
    scale: int

    def __call__(self, gt: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a camera (:func:`~drtl_plugin.tasks.random_camera.random_composition`) and distort all images with it.

        Args, returns and errors are those of :class:`DistortionTask`; drawing waits for the generator's device.
        """
        seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
        drawn = torch.Generator().manual_seed(int(seed))
        steps = _parse_distortions(random_composition(self.scale, drawn), self.scale, self.label).steps
        fixed = tuple(replace(step, ranges=_points_of(step.ranges, drawn)) for step in steps)
        return DistortionTask(self.label, fixed, self.scale)(gt, generator)


def _points_of(ranges: Mapping[str, tuple[float, float]], generator: torch.Generator) -> dict[str, tuple[float, float]]:
    """A random point of each range, as a range."""
    points = {
        key: low + (high - low) * torch.rand((), generator=generator).item() for key, (low, high) in ranges.items()
    }
    return {key: (point, point) for key, point in points.items()}


class DistortionLibrary:
    """The auxiliary tasks of a training run.

    Args:
        distortions (str | list[dict]): ``'default'`` (:func:`default_library`), or a list of entries: ``name`` (a
            registered distortion, ``bicubic``, ``compose`` or ``random_camera``), its parameters (``[low, high]`` or
            one number), and optionally ``label``. ``compose`` takes ``steps``, a list of such entries, applied in
            order; the reduction happens at ``bicubic`` if there is one, else before the first step that acts on the LQ
            grid. ``random_camera`` (:class:`RandomCamera`) takes no parameters.
        scale (int): Reduction factor of all tasks.
        where (str): Option that holds ``distortions``, for error messages.

    Attributes:
        tasks (tuple[Task, ...]): The N tasks.
        scale (int): Reduction factor.

    Raises:
        OptionError: For an unknown distortion or parameter, a range out of bounds, a label used twice, or no tasks.

    Example::

        library = DistortionLibrary([{'name': 'gaussian_blur', 'sigma': [0.6, 1.0]}, {'name': 'bicubic'}], scale=4)
        lq = library.tasks[0](gt, torch.Generator().manual_seed(0))
    """

    def __init__(self, distortions: Any, scale: int, where: str = 'distortions') -> None:
        if distortions == 'default':
            distortions = default_library(scale)
        if not isinstance(distortions, list) or not distortions:
            raise OptionError(f"{where}: expected 'default' or a list of distortions, got {distortions!r}.")
        self.tasks: tuple[Task, ...] = tuple(
            _parse_task(entry, scale, f'{where}[{i}]') for i, entry in enumerate(distortions)
        )
        self.scale = scale
        self._where = where
        labels = self.labels
        for label in labels:
            if labels.count(label) > 1:
                raise OptionError(f'{where}: two tasks are labelled {label!r}; give one of them another label.')

    def __len__(self) -> int:
        return len(self.tasks)

    def check_label(self, label: str) -> None:
        """Check that no task has a label yet.

        Raises:
            OptionError: If one has.
        """
        if label in self.labels:
            raise OptionError(f'{self._where}: a task is labelled {label!r}; give it another label.')

    def with_task(self, task: Task) -> DistortionLibrary:
        """Return a copy of this library with one more task, the last one.

        Raises:
            OptionError: If the library has a task of the same label.
        """
        self.check_label(task.label)
        extended = copy.copy(self)
        extended.tasks = (*self.tasks, task)
        return extended

    @property
    def labels(self) -> list[str]:
        """Names of the tasks, unique, in order."""
        return [task.label for task in self.tasks]


def _parse_task(entry: Any, scale: int, where: str) -> Task:
    if isinstance(entry, dict) and entry.get('name') == RANDOM_CAMERA:
        if set(entry) - {'name', 'label'}:
            raise OptionError(f'{where}: {RANDOM_CAMERA} takes no parameters except a label.')
        return RandomCamera(str(entry.get('label') or 'random camera'), scale)
    return _parse_distortions(entry, scale, where)


def _parse_distortions(entry: Any, scale: int, where: str) -> DistortionTask:
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
        raise OptionError(f'{where}: {REDUCTION} appears more than once; a task has one reduction.')
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
    if name in (COMPOSE, RANDOM_CAMERA):
        raise OptionError(f'{where}: {name} is a task of its own, not a step of {COMPOSE}.')
    if name not in DISTORTION_REGISTRY:
        raise unknown('distortion', name, [*DISTORTION_REGISTRY.keys(), REDUCTION, COMPOSE, RANDOM_CAMERA], where)
    kind = DISTORTION_REGISTRY.get(name)
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


def default_library(scale: int) -> list[dict[str, Any]]:
    """The shipped auxiliary tasks: blur × noise × compression, and five other kinds.

    Args:
        scale (int): Reduction factor; blur widths are proportional to it, as the size of an LQ pixel is.

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
                steps: list[dict[str, Any]] = [blurred] if sigma else []
                steps.append({'name': REDUCTION})
                if level:
                    steps.append({'name': 'gaussian_noise', 'sigma': level})
                if quality:
                    steps.append({'name': 'jpeg', 'quality': quality})
                entries.append({'name': COMPOSE, 'label': f'{blur} {noise} {compression}', 'steps': steps})
    wide = [0.15 * scale, 0.75 * scale]
    others: list[dict[str, Any]] = [
        {'name': 'anisotropic_blur', 'sigma_x': wide, 'sigma_y': wide, 'kernel_size': kernel_size},
        {'name': 'plateau_blur', 'sigma': [0.2 * scale, 0.6 * scale], 'kernel_size': kernel_size},
        {'name': 'sinc', 'cutoff': [0.8 * math.pi / scale, min(1.6 / scale, 1) * math.pi], 'kernel_size': kernel_size},
        {'name': 'poisson_noise'},
        {'name': 'sharpen'},
    ]
    return entries + [{**entry, 'label': entry['name'].replace('_', ' ')} for entry in others]
