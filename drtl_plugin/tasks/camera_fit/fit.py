"""A camera's own degradation, fitted to its registered pairs: an auxiliary task beside the synthetic distortions.

K pairs say more than which known distortion is near. The model of the low-quality image ``y`` of ground truth ``x``::

    y = t((k * x) ↓ s) + d(x) + n,        Var n = c_0 + c_1 · y + c_2 · |∇y|²

with a kernel ``k`` for each colour on the ground truth's grid (the reduction by s is part of it), a tone curve ``t``
for each colour, a cubic polynomial, and noise that grows with intensity and at edges, correlated between colours and
between neighbouring pixels. While the kernel is fitted, each pair has a gain, an offset and a sub-pixel shift of its
own: exposure and registration differ between pairs. All but the correction is least squares in closed form. What the
ground truth of the pairs lacks in sharpness against other photographs is fitted, too: a network learns to restore what
the camera calls good.

Compression is not modelled: its blocks pass for noise.

This is an addition to the paper (arXiv 2111.13078), whose auxiliary tasks are synthetic.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from basicsr.utils.img_process_util import filter2D
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

from drtl_plugin.errors import DataError
from drtl_plugin.runtime.progress import progress
from drtl_plugin.tasks.camera_fit.correction import Correction, correct, share_left, train_correction
from drtl_plugin.tasks.distortions import bicubic

Pair = tuple[Tensor, Tensor]

# Regularisation of the kernel that is tried, as shares of the mean energy of a tap.
_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2)
# Alternations between the kernel, and shifts and gains.
_ROUNDS = 3
# Side, in low-quality pixels, of the blocks that noise is averaged over before its model is fitted.
_BLOCK = 4
# Low-quality pixels of a pair that the kernel is fitted to, about.
_PIXELS = 12_000
# Side of what is looked at of large pairs, in pixels of the ground truth.
_LARGEST = 768
# Frequencies, in cycles a pixel, that sharpness is compared in: above the content's own differences, below noise.
_BAND = (0.1, 0.35)
# A fit is worth its while if it explains so much of what bicubic reduction leaves, on a pair that it has not seen.
_WORTHWHILE = 0.05


@dataclass(frozen=True, eq=False)
class CameraFit:
    """A fitted camera, which degrades other photographs as the camera would.

    Attributes:
        scale (int): Reduction factor.
        kernel (Tensor): ``(3, n, n)`` on the ground truth's grid, R G B, each of sum 1; n and scale are both even or
            both odd.
        tone (Tensor): ``(3, 4)``: for each colour the coefficients of 1, z, z², z³ of the tone curve.
        shift (Tensor): ``(K, 2)``, by which the content of each pair's low-quality image lies further down and to the
            right than the other pairs', in pixels of the ground truth; of mean 0, since the kernel has the rest.
        noise (Tensor): ``(3, 3)``: for each colour ``c_0``, ``c_1`` and ``c_2``, of images in [0, 1].
        colour_correlation (Tensor): ``(3, 3)``, of the noise between colours.
        neighbour_correlation (float): Of the noise between adjacent pixels.
        gt_sigma (float): Width of the Gaussian that makes photographs as soft as the pairs' ground truth, in pixels.
        explained (float): Share of the energy that bicubic reduction of the ground truth leaves (after gain, offset and
            shift) which kernel and correction explain.
        explained_left_out (float): The same on pairs that were left out; of a single pair, quarters. (Of the kernel,
            each in turn; of the correction, the last.)
        correction (Correction): Empty where none helps.
    """

    label: ClassVar[str] = 'camera fit'  # its name as an auxiliary task

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
        """Reasons not to trust the fit, for people to read; none if it can be trusted."""
        reasons = []
        if len(self.shift) < 2:
            reasons.append('it is fitted to a single pair; what is the camera and what is that scene cannot be told')
        if self.explained_left_out < _WORTHWHILE:
            reasons.append(
                f'on pairs that it has not seen it explains {self.explained_left_out:.0%} of what bicubic reduction '
                'leaves; the pairs may be too few, misregistered, or hardly differ from a bicubic reduction'
            )
        worst = self.shift.abs().max().item()
        if worst > self.scale:
            reasons.append(f'pairs are shifted against each other by up to {worst:.1f} pixels; register them better')
        return reasons

    def summary(self) -> str:
        """What was found, in a line."""
        widths = ', '.join(f'{kernel_sigma(kernel):.2f}' for kernel in self.kernel)
        return (
            f'kernels of {widths} pixels (R, G, B), ground truth soft by {self.gt_sigma:.2f} pixels; '
            f'{self.explained:.0%} of the residual explained, {self.explained_left_out:.0%} of pairs left out'
        )

    def ground_truth(self, img: Tensor) -> Tensor:
        """Photographs ``(B, 3, H, W)`` in [0, 1], made as soft as the camera's ground truth."""
        return _soften(img, self.gt_sigma)

    def __call__(self, gt: Tensor, generator: torch.Generator) -> Tensor:
        """Degrade ground truth as the camera would.

        Args:
            gt (Tensor): ``(B, 3, H, W)``, RGB in [0, 1]; H and W are multiples of the scale.
            generator (torch.Generator): Source of the noise.

        Returns:
            Tensor: ``(B, 3, H / scale, W / scale)`` in [0, 1], rounded to 8 bits as a file would be.
        """
        tone, kernel = (tensor.to(gt, non_blocking=True) for tensor in (self.tone, self.kernel))
        img = _toned(tone, reduce_by(gt, kernel, self.scale))
        if self.correction:
            img = correct(self.correction, gt, img)
        img = img + self._noise_for(img, generator)
        return (img * 255).round().clamp(0, 255) / 255

    def _noise_for(self, img: Tensor, generator: torch.Generator) -> Tensor:
        white = torch.randn(img.shape, generator=generator, device=generator.device).to(img)
        colours = torch.linalg.cholesky(self.colour_correlation).to(img, non_blocking=True)
        mixed = torch.einsum('ij,bjhw->bihw', colours, white)
        neighbour = _neighbour_tap(self.neighbour_correlation)
        tap = torch.tensor([neighbour, 1.0, neighbour]).to(img, non_blocking=True)
        tap = tap / tap.norm()
        correlated = filter2D(mixed, torch.outer(tap, tap)[None])
        constant, shot, edges = self.noise.T.to(img, non_blocking=True)[..., None, None]
        brightness, slope = _brightness_and_slope(img)
        return correlated * (constant + shot * brightness + edges * slope).sqrt()

    def save(self, path: str | Path) -> None:
        """Write the fit to a file of some kilobytes."""
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: str | Path) -> CameraFit:
        """Read a fit that was saved.

        Raises:
            DataError: If the file is missing or is not one.
        """
        try:
            return cls(**torch.load(path, map_location='cpu', weights_only=True))
        except OSError as error:
            raise DataError(f'{path}: cannot read the camera fit ({error.strerror}).') from None
        except Exception as error:  # whatever unpickling makes of a file of another kind
            raise DataError(f'{path}: not a camera fit ({type(error).__name__}).') from None

    def draw(self, path: str | Path) -> None:
        """Write a picture of the kernels, with their widths, and what the fit explains."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.4), layout='constrained')
        limit = self.kernel.abs().max().item()
        for axes, name, kernel in zip(figure.subplots(1, 3), ('red', 'green', 'blue'), self.kernel):
            axes.imshow(kernel, cmap='RdBu', vmin=-limit, vmax=limit)
            axes.set_title(f'{name}: sigma {kernel_sigma(kernel):.2f} px')
            axes.axis('off')
        figure.suptitle(self.summary().replace('; ', '\n'), fontsize=10)
        figure.savefig(path, dpi=110)


def kernel_sigma(kernel: Tensor) -> float:
    """Width, in pixels, of the Gaussian that has the energy ``Σ k² = 1 / (4πσ²)`` of a kernel ``(n, n)`` of sum 1.

    (Its variance would be that of its farthest taps, which say least.)
    """
    return 1 / (2 * math.sqrt(math.pi * kernel.square().sum().item()))


def reduce_by(gt: Tensor, kernel: Tensor, scale: int) -> Tensor:
    """``(k * x) ↓ s``: each pixel of the result is a weighted sum around the centre of the s × s pixels that it covers.

    Args:
        gt (Tensor): ``(B, C, H, W)``; H and W are multiples of ``scale``; continued by reflection.
        kernel (Tensor): ``(C, n, n)``; n and scale are both even or both odd. Not flipped.
        scale (int): s.

    Returns:
        Tensor: ``(B, C, H / scale, W / scale)``.
    """
    margin = (kernel.shape[-1] - scale) // 2
    padded = F.pad(gt, (margin,) * 4, mode='reflect')
    return F.conv2d(padded, kernel[:, None], stride=scale, groups=len(kernel))


def fit_camera(pairs: Sequence[Pair], photographs: Tensor) -> CameraFit:
    """Fit a camera to registered pairs.

    Args:
        pairs (Sequence[tuple[Tensor, Tensor]]): K pairs ``(lq, gt)``, uint8, ``(3, h, w)`` and ``(3, s h, s w)``, RGB.
        photographs (Tensor): ``(P, 3, H, W)`` in [0, 1], of ordinary sharpness: the auxiliary ground truth.

    Returns:
        CameraFit: With ``warnings()``, where it should not be trusted.

    Raises:
        DataError: If a side of a pair is below four times the kernel's, as is needed to judge the fit by quarters, or
            a colour is black in all LQ or in all GT images; it names the colour.
    """
    scale = pairs[0][1].shape[-1] // pairs[0][0].shape[-1]
    # Wide enough for lenses at x4, and for what is left of them at x2.
    taps = max(5 * scale, 14 + scale % 2)
    if min(min(gt.shape[-2:]) for _, gt in pairs) < 4 * taps:
        raise DataError(f'a camera cannot be fitted to pairs of less than {4 * taps} pixels of ground truth a side.')
    for side, images in zip(('LQ', 'GT'), zip(*pairs)):
        lit = functools.reduce(operator.or_, (image.flatten(1).any(dim=1) for image in images)).tolist()
        if not all(lit):
            black = ', '.join(name for name, is_lit in zip(('red', 'green', 'blue'), lit) if not is_lit)
            raise DataError(f'a camera cannot be fitted to pairs whose {side} images are black throughout in {black}.')
    lqs, gts = zip(*(_middle(lq.double() / 255, gt.double() / 255) for lq, gt in pairs))
    shift = torch.zeros(len(pairs), 2, dtype=torch.float64)
    gain, offset = torch.ones(len(pairs), 3).double(), torch.zeros(len(pairs), 3).double()
    for _ in progress(range(_ROUNDS), 'camera fit, kernel', _ROUNDS, 'round'):
        shifted = [_shifted(gt, move) for gt, move in zip(gts, shift)]
        levelled = [(lq - _per_colour(o)) / _per_colour(a) for lq, a, o in zip(lqs, gain, offset)]
        parts = list(zip(levelled, shifted)) if len(pairs) > 1 else _quarters(levelled[0], shifted[0])
        kernel, explained, explained_left_out = _solve([_equations(lq, gt, taps) for lq, gt in parts], taps)
        reduced = [reduce_by(gt[None], kernel, scale)[0] for gt in shifted]
        models = []
        for p, (lq, z) in enumerate(zip(lqs, reduced)):
            gain[p], offset[p] = _level(z, lq)
            models.append(z * _per_colour(gain[p]) + _per_colour(offset[p]))
            shift[p] += _remaining_shift(models[p], lq) * scale
        shift -= shift.mean(dim=0)
    tone = _fit_tone(reduced, lqs)
    toned = [_toned(tone, z[None])[0] for z in reduced]
    levels = [_level(z, lq) for z, lq in zip(toned, lqs)]
    levelled = [(lq - _per_colour(o)) / _per_colour(a) for lq, (a, o) in zip(lqs, levels)]
    correction, left, left_of_unseen = _fit_correction(shifted, toned, levelled)
    if correction:
        toned = [correct(correction, gt[None], z[None])[0] for gt, z in zip(shifted, toned)]
    models = [z * _per_colour(a) + _per_colour(o) for z, (a, o) in zip(toned, levels)]
    noise, colours, neighbours = _fit_noise(models, lqs)
    return CameraFit(
        scale=scale,
        kernel=kernel.float(),
        tone=tone.float(),
        shift=shift.float(),
        noise=noise.float(),
        colour_correlation=colours.float(),
        neighbour_correlation=neighbours,
        gt_sigma=_relative_softness(gts, photographs.double()),
        explained=1 - (1 - explained) * left,
        explained_left_out=1 - (1 - explained_left_out) * left_of_unseen,
        correction=correction,
    )


def _fit_correction(
    gts: Sequence[Tensor], models: Sequence[Tensor], lqs: Sequence[Tensor]
) -> tuple[Correction, float, float]:
    """A correction, or an empty one; and what it leaves of the model's error, and of that on what it has not seen."""
    parts = [tuple(image.float() for image in images) for images in zip(gts, models, lqs)]
    if len(parts) == 1:
        gt, model, lq = parts[0]
        parts = [(whole, z, y) for (y, whole), (z, _) in zip(_quarters(lq, gt), _quarters(model, gt))]
    generator = torch.Generator().manual_seed(0)
    left_of_unseen = share_left(train_correction(parts[:-1], generator), parts[-1:])
    if left_of_unseen > 1 - _WORTHWHILE:
        return (), 1.0, 1.0
    correction = train_correction(parts, generator)
    return correction, share_left(correction, parts), left_of_unseen


@dataclass(frozen=True, eq=False)
class _Equations:
    """Normal equations of the kernel over a part of the pairs, for each colour.

    Attributes:
        gram (Tensor): ``(3, n², n²)``, of the ground truth's neighbourhoods.
        product (Tensor): ``(3, n²)``, with the low-quality pixels.
        energy (Tensor): ``(3,)``, of the low-quality pixels.
        bicubic_error (float): What bicubic reduction leaves.
    """

    gram: Tensor
    product: Tensor
    energy: Tensor
    bicubic_error: float

    def __add__(self, other: _Equations) -> _Equations:
        return _Equations(*(mine + yours for mine, yours in zip(vars(self).values(), vars(other).values())))

    def error(self, kernel: Tensor) -> float:
        """Squared error that kernels ``(3, n²)`` leave."""
        quadratic = torch.einsum('ci,cij,cj->c', kernel, self.gram, kernel)
        return (self.energy - 2 * (kernel * self.product).sum(dim=1) + quadratic).sum().item()


def _equations(lq: Tensor, gt: Tensor, taps: int) -> _Equations:
    """The equations of a pair; pixels near its border, whose neighbourhoods are cut, are left out."""
    scale = gt.shape[-1] // lq.shape[-1]
    border = math.ceil((taps - scale) / (2 * scale))
    start = border * scale - (taps - scale) // 2
    inner = lq[:, border:-border, border:-border]
    reduced = bicubic(gt[None], scale)[0, :, border:-border, border:-border]
    gram = gt.new_zeros(3, taps**2, taps**2)
    product = gt.new_zeros(3, taps**2)
    # Rows some way apart: neighbours say little that is new, and all of them would take minutes and gigabytes.
    rows = range(0, inner.shape[1], math.ceil(inner[0].numel() / _PIXELS))
    for row in rows:
        top = start + row * scale
        strip = gt[:, None, top : top + taps, start : start + (inner.shape[2] - 1) * scale + taps]
        neighbourhoods = F.unfold(strip, taps, stride=scale)
        gram += neighbourhoods @ neighbourhoods.mT
        product += torch.einsum('cnl,cl->cn', neighbourhoods, inner[:, row])
    inner, reduced = inner[:, rows], reduced[:, rows]
    return _Equations(gram, product, inner.square().sum(dim=(1, 2)), (inner - reduced).square().sum().item())


def _quarters(lq: Tensor, gt: Tensor) -> list[Pair]:
    scale = gt.shape[-1] // lq.shape[-1]
    height, width = (extent // 2 for extent in lq.shape[-2:])
    return [
        tuple(
            image[:, top * s * height : (top + 1) * s * height, left * s * width : (left + 1) * s * width]
            for image, s in ((lq, 1), (gt, scale))
        )
        for top in range(2)
        for left in range(2)
    ]


def _regularisation(taps: int) -> Tensor:
    """Penalty ``(n², n²)`` on rough kernels and on taps far from the centre."""
    centre = (taps - 1) / 2
    axis = (torch.arange(taps, dtype=torch.float64) - centre) / centre
    radius = (axis[:, None] ** 2 + axis**2).flatten()
    unit = torch.eye(taps**2, dtype=torch.float64).view(-1, 1, taps, taps)
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64)
    rough = F.conv2d(unit, laplacian[None, None], padding=1).flatten(1)
    return rough @ rough.T / 4 + torch.diag(0.1 + radius**2)


def _solve(parts: list[_Equations], taps: int) -> tuple[Tensor, float, float]:
    """The kernel ``(3, n, n)`` of all parts, and what it explains of them, and of a part left out of its fit.

    How strong the regularisation is, is what serves the parts that are left out best.
    """
    total = functools.reduce(operator.add, parts)
    others = [functools.reduce(operator.add, parts[:i] + parts[i + 1 :]) for i in range(len(parts))]
    penalty = _regularisation(taps)

    def kernel_of(equations: _Equations, ridge: float) -> Tensor:
        energy = equations.gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-9)  # of what may be black
        factor = torch.linalg.cholesky(equations.gram + ridge * energy[:, None, None] * penalty)
        return torch.cholesky_solve(equations.product[..., None], factor)[..., 0]

    left_out = {
        ridge: sum(part.error(kernel_of(rest, ridge)) for part, rest in zip(parts, others)) for ridge in _RIDGES
    }
    ridge = min(left_out, key=left_out.get)
    kernel = kernel_of(total, ridge)
    explained, explained_left_out = (
        1 - e / max(total.bicubic_error, 1e-12) for e in (total.error(kernel), left_out[ridge])
    )
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    return kernel.view(3, taps, taps), explained, explained_left_out


def _per_colour(values: Tensor) -> Tensor:
    return values[:, None, None]


def _middle(lq: Tensor, gt: Tensor) -> Pair:
    """The middle of large pairs: enough to fit to, in seconds."""
    scale = gt.shape[-1] // lq.shape[-1]
    sides = [min(extent, _LARGEST // scale) for extent in lq.shape[-2:]]
    top, left = ((extent - side) // 2 for extent, side in zip(lq.shape[-2:], sides))
    return lq[:, top : top + sides[0], left : left + sides[1]], gt[
        :, scale * top : scale * (top + sides[0]), scale * left : scale * (left + sides[1])
    ]


def _shifted(img: Tensor, shift: Tensor) -> Tensor:
    """The content of ``(3, H, W)`` moved down and to the right by ``shift``, ``(2,)`` in pixels, exact for what is
    sampled finely enough. Mirrored beyond its borders."""
    height, width = img.shape[-2:]
    mirrored = torch.cat([img, img.flip(-1)], dim=-1)
    mirrored = torch.cat([mirrored, mirrored.flip(-2)], dim=-2)
    down = torch.fft.fftfreq(2 * height, dtype=img.dtype)[:, None] * shift[0]
    right = torch.fft.rfftfreq(2 * width, dtype=img.dtype) * shift[1]
    spectrum = torch.fft.rfft2(mirrored) * torch.exp(-2j * math.pi * (down + right))
    return torch.fft.irfft2(spectrum, s=mirrored.shape[-2:])[..., :height, :width].contiguous()


def _level(model: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and offset ``(3,)`` that bring ``model`` nearest to ``lq``, in the least-squares sense."""
    model, lq = model.flatten(1), lq.flatten(1)
    centred = model - model.mean(dim=1, keepdim=True)
    gain = (centred * lq).sum(dim=1) / centred.square().sum(dim=1).clamp_min(1e-12)
    gain = gain.clamp(0.1, 10)  # images without contrast have none, and it is divided by
    return gain, lq.mean(dim=1) - gain * model.mean(dim=1)


def _toned(tone: Tensor, reduced: Tensor) -> Tensor:
    """The tone curves ``(3, 4)`` on ``(B, 3, h, w)``."""
    # Beyond what it was fitted to, a polynomial means nothing.
    return torch.einsum('ci,bchwi->bchw', tone, _powers(reduced.clamp(0, 1)))


def _powers(z: Tensor) -> Tensor:
    """1, z, z², z³ in a last dimension."""
    return torch.stack([z**power for power in range(4)], dim=-1)


def _fit_tone(reduced: Sequence[Tensor], lqs: Sequence[Tensor]) -> Tensor:
    """Tone curves ``(3, 4)`` from the reduced ground truth to the low-quality pixels of all pairs."""
    inputs, outputs = (torch.cat([image.flatten(1) for image in images], dim=1) for images in (reduced, lqs))
    return torch.linalg.lstsq(_powers(inputs), outputs[..., None]).solution[..., 0]


def _brightness_and_slope(img: Tensor) -> tuple[Tensor, Tensor]:
    """What noise depends on: mean over colours of ``(B, 3, h, w)`` and its squared gradient, ``(B, 1, h, w)`` each."""
    brightness = img.mean(dim=-3, keepdim=True).clamp_min(0)
    down, right = torch.gradient(brightness, dim=(-2, -1))
    return brightness, down**2 + right**2


def _remaining_shift(model: Tensor, lq: Tensor) -> Tensor:
    """By how much ``lq`` lies further down and to the right than ``model``, ``(2,)`` in its pixels.

    A Gauss-Newton step: ``lq(x) ≈ model(x) - d · ∇model(x)``.
    """
    slopes = torch.stack([slope.flatten() for slope in torch.gradient(model, dim=(-2, -1))], dim=1)
    return -torch.linalg.lstsq(slopes, (lq - model).flatten()[:, None]).solution[:, 0]


def _neighbour_tap(correlation: float) -> float:
    """``t`` such that white noise under the filter [t, 1, t] correlates so much with its neighbours: 2t / (1 + 2t²)."""
    if correlation < 1e-6:
        return 0.0
    return (1 - math.sqrt(1 - 2 * correlation**2)) / (2 * correlation)


def _fit_noise(models: Sequence[Tensor], lqs: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Fit the noise to what the models leave.

    Returns:
        tuple[Tensor, Tensor, float]: As in :class:`CameraFit`: ``noise``, ``colour_correlation``,
        ``neighbour_correlation``.
    """
    residuals = [lq - model for lq, model in zip(lqs, models)]
    features = []
    for model in models:
        brightness, slope = _brightness_and_slope(model[None])
        features.append(torch.cat([torch.ones_like(brightness), brightness, slope], dim=1)[0])

    def blocks(images: Sequence[Tensor]) -> Tensor:
        return torch.cat([F.avg_pool2d(image[None], _BLOCK)[0].flatten(1) for image in images], dim=1)

    inputs, energies = blocks(features).T, blocks([residual**2 for residual in residuals])
    noise = []
    for energy in energies:
        weight = torch.ones_like(energy)
        for _ in range(3):  # the spread of a variance's estimate grows with the variance
            row = torch.from_numpy(nnls((inputs * weight[:, None]).numpy(), (energy * weight).numpy())[0])
            weight = 1 / (inputs @ row + 1e-3 * energy.mean() + 1e-12)
        noise.append(row)
    noise = torch.stack(noise)
    normal = []
    for residual, feature in zip(residuals, features):
        variance = torch.einsum('cf,fhw->chw', noise, feature)
        normal.append(residual / (variance + 1e-9).sqrt())
    colours = torch.corrcoef(torch.cat([z.flatten(1) for z in normal], dim=1))
    colours = colours.nan_to_num().fill_diagonal_(1) * 0.999 + 0.001 * torch.eye(3, dtype=colours.dtype)
    energy = sum(z.square().mean().item() for z in normal)
    down, right = (sum((z * z.roll(1, axis)).mean().item() for z in normal) for axis in (1, 2))
    neighbours = (down + right) / 2 / max(energy, 1e-12)
    return noise, colours, min(max(neighbours, 0.0), 0.7)


def _soften(img: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``(B, 3, H, W)``; below a quarter of a pixel there is nothing to sample a Gaussian by."""
    if sigma < 0.25:
        return img
    # A Gaussian is separable, and for patches a product with a band matrix is several times as fast as a convolution.
    rows, columns = (_blurring(extent, sigma).to(img, non_blocking=True) for extent in img.shape[-2:])
    return rows.T @ img @ columns


@functools.lru_cache(maxsize=8)  # a training softens patches of one size by one width
def _blurring(extent: int, sigma: float) -> Tensor:
    """``(n, n)``: the matrix by which rows of n pixels are multiplied to be blurred, mirrored at their ends."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1).double() ** 2) / (2 * sigma**2))
    impulses = F.pad(torch.eye(extent, dtype=torch.float64)[:, None], (radius, radius), mode='reflect')
    return F.conv1d(impulses, (kernel / kernel.sum())[None, None])[:, 0]


def _spectrum(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power of ``(P, 3, n, n)``, brightness, and its squared frequency in cycles a pixel; both flat."""
    side = patches.shape[-1]
    brightness = patches.mean(dim=1)
    window = torch.hann_window(side, periodic=False, dtype=patches.dtype)
    windowed = (brightness - brightness.mean(dim=(1, 2), keepdim=True)) * torch.outer(window, window)
    power = torch.fft.rfft2(windowed).abs().square().mean(dim=0)
    squared = torch.fft.fftfreq(side, dtype=patches.dtype)[:, None] ** 2 + torch.fft.rfftfreq(side).to(patches) ** 2
    return power.flatten(), squared.flatten()


def _relative_softness(gts: Sequence[Tensor], photographs: Tensor) -> float:
    """Width of the Gaussian, in pixels, under which photographs have the slope of the ground truth's spectrum.

    Under a Gaussian of width σ, power falls by ``exp(-4π²σ²f²)``. 0 where the ground truth is the sharper one.
    """
    side = min(photographs.shape[-1], *(extent for gt in gts for extent in gt.shape[-2:]))
    tiles = [gt.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1) for gt in gts]
    soft, squared = _spectrum(torch.cat(tiles))
    sharp, _ = _spectrum(photographs[..., :side, :side])
    band = (squared > _BAND[0] ** 2) & (squared < _BAND[1] ** 2)
    ratio, squared = (soft[band] / sharp[band].clamp_min(1e-12)).clamp_min(1e-12).log(), squared[band]
    squared = squared - squared.mean()
    slope = (squared * ratio).sum() / squared.square().sum()
    return math.sqrt(max(-slope.item(), 0)) / (2 * math.pi)
