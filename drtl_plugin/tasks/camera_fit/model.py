"""A camera's degradation, fitted to its aligned pairs: an auxiliary task in addition to the synthetic distortions.

The model of an LQ image ``y`` of GT ``x``::

    y = t((k * x) ↓ s) + d(x) + n,        Var n = c_0 + c_1 · y + c_2 · |∇y|²

Each colour has a kernel ``k`` on the GT grid (it includes the reduction by s) and a cubic tone curve ``t``. ``d`` is an
optional learned correction. The noise ``n`` grows with intensity and at edges, and is correlated between colours and
between adjacent pixels. The blur that makes other photographs as soft as the pairs' GT is part of the fit, so that a
network learns to restore GT of the camera's own sharpness.

Compression is not modelled; its artefacts count as noise.

This is ours: the auxiliary tasks of the paper (arXiv 2111.13078) are synthetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from drtl_plugin.tasks.camera_fit.correction import WORTHWHILE, Correction, correct
from drtl_plugin.tasks.camera_fit.kernel import kernel_sigma, reduce_by
from drtl_plugin.tasks.camera_fit.noise import synthesise_noise
from drtl_plugin.tasks.camera_fit.sharpness import soften
from drtl_plugin.tasks.camera_fit.tone import apply_tone


@dataclass(frozen=True, eq=False)
class CameraFit:
    """A fitted camera: an auxiliary task that degrades other photographs as the camera would.

    Attributes:
        scale (int): Reduction factor.
        kernel (Tensor): ``(3, n, n)`` on the GT grid, RGB, each of sum 1; n and scale are both even or
            both odd.
        tone (Tensor): ``(3, 4)``: for each colour the coefficients of 1, z, z², z³ of the tone curve.
        shift (Tensor): ``(K, 2)``: shift (down, right) of each pair's LQ image against the mean of all pairs, in GT
            pixels. The kernel contains the mean shift.
        noise (Tensor): ``(3, 3)``: ``c_0``, ``c_1`` and ``c_2`` of each colour, for images in [0, 1].
        colour_correlation (Tensor): ``(3, 3)``: correlation of the noise between colours.
        neighbour_correlation (float): Correlation of the noise between adjacent pixels.
        gt_sigma (float): Sigma, in pixels, of the Gaussian that makes photographs as soft as the pairs' GT.
        explained (float): Share of the squared error of bicubic downsampling (after gain, offset and shift) that
            kernel and correction explain.
        explained_left_out (float): The same on left-out pairs (quarters, if there is one pair): each in turn for the
            kernel, the last one for the correction.
        correction (Correction): Empty if none helps.
    """

    label: ClassVar[str] = 'camera fit'

    scale: int
    kernel: Tensor
    tone: Tensor
    shift: Tensor
    noise: Tensor
    colour_correlation: Tensor
    neighbour_correlation: float
    gt_sigma: float
    explained: float
    explained_left_out: float
    correction: Correction = ()

    def warnings(self) -> list[str]:
        """Reasons not to trust the fit, one sentence each; empty if there are none."""
        reasons = []
        if len(self.shift) < 2:
            reasons.append('it is fitted to a single pair, which cannot separate the camera from the scene')
        if self.explained_left_out < WORTHWHILE:
            reasons.append(
                f'it explains {self.explained_left_out:.0%} of the error of bicubic downsampling on left-out pairs; '
                'the pairs may be too few, misaligned, or hardly different from bicubic downsampling'
            )
        worst = self.shift.abs().max().item()
        if worst > self.scale:
            reasons.append(f'pairs are shifted against each other by up to {worst:.1f} GT pixels; align them better')
        return reasons

    def summary(self) -> str:
        """One line: kernel widths, softness of the GT, and share of the error explained."""
        widths = ', '.join(f'{kernel_sigma(kernel):.2f}' for kernel in self.kernel)
        return (
            f'kernel sigma {widths} px (R, G, B), GT softness {self.gt_sigma:.2f} px; '
            f'explains {self.explained:.0%} of the residual, {self.explained_left_out:.0%} on left-out pairs'
        )

    def ground_truth(self, img: Tensor) -> Tensor:
        """Make photographs ``(B, 3, H, W)`` in [0, 1] as soft as the pairs' GT."""
        return soften(img, self.gt_sigma)

    def __call__(self, gt: Tensor, generator: torch.Generator) -> Tensor:
        """Degrade GT as the camera would.

        Args:
            gt (Tensor): ``(B, 3, H, W)``, RGB in [0, 1]; H and W are multiples of the scale.
            generator (torch.Generator): Source of the noise.

        Returns:
            Tensor: ``(B, 3, H / scale, W / scale)`` in [0, 1], rounded to 8 bits as in a file.
        """
        tone, kernel = (tensor.to(gt, non_blocking=True) for tensor in (self.tone, self.kernel))
        img = apply_tone(tone, reduce_by(gt, kernel, self.scale))
        if self.correction:
            img = correct(self.correction, gt, img)
        img = img + synthesise_noise(img, self.noise, self.colour_correlation, self.neighbour_correlation, generator)
        return (img * 255).round().clamp(0, 255) / 255

    def state(self) -> dict[str, Any]:
        """All attributes as tensors and plain values, to save."""
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: object) -> CameraFit:
        """Build a fit from :meth:`state`.

        Raises:
            ValueError: If it is something else.
        """
        names = {attribute.name for attribute in dataclasses.fields(cls)}
        if not isinstance(state, Mapping) or not names - {'correction'} <= state.keys() <= names:
            raise ValueError('not the state of a camera fit')
        return cls(**state)
