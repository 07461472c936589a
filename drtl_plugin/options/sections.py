"""The options of this plug-in: type, range, default and description of each, declared once.

The schema and ``docs/options.md`` are generated from these classes and those of :mod:`drtl_plugin.options.basicsr`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from drtl_plugin.errors import OptionError
from drtl_plugin.options.convert import LARGEST, Section, parse_section


def _disk() -> dict[str, Any]:
    return {'type': 'disk'}


class WeightingOptions(Section, frozen=True, kw_only=True):
    """``drtl.weighting``: how relations become gradient weights."""

    relation: Annotated[
        str,
        Meta(
            description='How relations are estimated: transfer, predicted_transfer, embedding, gradient, uniform, or '
            'an estimator of your own.'
        ),
    ] = 'transfer'
    effective_tasks: Annotated[
        float,
        Meta(
            ge=1,
            le=LARGEST,
            description='Effective number of tasks: exp(entropy of the weights), before floor is applied. The softmax '
            'temperature is solved to reach it.',
        ),
    ] = 6.0
    temperature: Annotated[
        Annotated[float, Meta(ge=1e-6, le=LARGEST)] | None,
        Meta(description='Softmax temperature; replaces effective_tasks.'),
    ] = None
    floor: Annotated[
        float, Meta(ge=0, le=1, description='Share of the total weight that is spread evenly over all tasks.')
    ] = 0.2
    fit_share: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description='Share of the total weight that is reserved for the camera fit; its relation adds to this. '
            'Only with drtl.camera_fit.',
        ),
    ] = 0.9
    mode: Annotated[
        Literal['gradient', 'sampling'],
        Meta(
            description="gradient: weights multiply the tasks' gradients. sampling: tasks are drawn with probability "
            'proportional to their weight.'
        ),
    ] = 'sampling'


class InnerOptions(Section, frozen=True, kw_only=True):
    """``drtl.inner``: the inner loop of the meta-learning pipeline."""

    algorithm: Annotated[
        Literal['fomaml', 'maml', 'reptile'],
        Meta(description='Outer gradient: first-order (fomaml), exact second-order (maml), or Reptile.'),
    ] = 'fomaml'
    lr: Annotated[float, Meta(ge=1e-12, le=LARGEST, description='Step size of the inner loop.')] = 1e-2
    steps: Annotated[
        Annotated[int, Meta(ge=1)] | list[Annotated[int, Meta(ge=1)]],
        Meta(description='Gradient steps of the inner loop; [low, high]: drawn for each episode.'),
    ] = 1
    batch_size: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description='Support patches of an inner step, taken in turn; null: all of them in each step.'),
    ] = None
    checkpoint: Annotated[
        bool,
        Meta(
            description='maml only: recompute inner steps in the backward pass instead of storing their graphs; takes '
            'less memory and more time.'
        ),
    ] = False
    parameters: Annotated[
        list[str],
        Meta(
            description='Name patterns of the parameters that the inner loop adapts, e.g. conv_last.* for the last '
            'layer only (ANIL).'
        ),
    ] = msgspec.field(default_factory=lambda: ['*'])
    rate_lr: Annotated[
        float,
        Meta(
            ge=0,
            le=LARGEST,
            description="Adam's learning rate for the logarithms of learned step sizes, one for each tensor of "
            'weights, initialised to lr; 0 keeps the step sizes fixed.',
        ),
    ] = 0.0

    @property
    def fewest_steps(self) -> int:
        """The fewest gradient steps of an episode."""
        return self.steps if isinstance(self.steps, int) else self.steps[0]

    @property
    def most_steps(self) -> int:
        """The most gradient steps of an episode."""
        return self.steps if isinstance(self.steps, int) else self.steps[1]


class AdaptOptions(Section, frozen=True, kw_only=True):
    """``drtl.adapt``: few-shot adaptation to the target."""

    removed: ClassVar[Mapping[str, str]] = {
        'rank': 'adaptation trains all weights; for smaller changes, lower drtl.adapt.lr or drtl.adapt.steps.',
        'replay_source': 'replay draws auxiliary tasks by weight; drtl.weighting.fit_share sets the share of the fit.',
    }

    steps: Annotated[int, Meta(ge=0, description='Steps on the support set; with early_stop, the maximum.')] = 50
    lr: Annotated[
        Annotated[float, Meta(ge=0, le=LARGEST)] | list[Annotated[float, Meta(ge=0, le=LARGEST)]],
        Meta(description='Learning rate of Adam; with folds, possibly a list, of which held-out pairs choose one.'),
    ] = 3e-4
    schedule: Annotated[
        Literal['constant', 'linear'], Meta(description='linear: the learning rate falls to 0 over the steps.')
    ] = 'constant'
    warmup: Annotated[
        int,
        Meta(
            ge=0,
            description="Steps over which Adam's learning rate rises to lr. Without warm-up, the first steps damage a "
            'trained network.',
        ),
    ] = 50
    optimizer: Annotated[
        Literal['adam', 'inner'],
        Meta(description="adam, or inner: plain gradient descent with the inner loop's step sizes and parameters."),
    ] = 'adam'
    batch_size: Annotated[int, Meta(ge=1, description='Patches per step.')] = 8
    replay: Annotated[float, Meta(ge=0, le=1, description='Share of synthetic patches in each batch.')] = 0.5
    ema_decay: Annotated[
        float, Meta(ge=0, le=1, description='Decay of the moving average of the adapted weights; 0 turns it off.')
    ] = 0.99
    early_stop: Annotated[
        bool,
        Meta(description='Choose the number of steps on a held-out fifth of the pairs, then adapt to all of them.'),
    ] = False
    folds: Annotated[
        int,
        Meta(
            ge=0,
            description='Cross-validation: the most parts of the pairs to hold out in turn. The result is the average '
            'of the networks adapted without each of them, or lies between it and the network before adaptation, '
            'whichever is best on held-out pairs. 0: one adaptation to all pairs.',
        ),
    ] = 0
    mixup: Annotated[
        float, Meta(ge=0, le=1, description='Probability that a patch is mixed with another one (mixup).')
    ] = 0.0
    rgb_permutation: Annotated[
        float, Meta(ge=0, le=1, description='Probability that the colours of a patch are permuted.')
    ] = 0.0

    @property
    def rates(self) -> list[float]:
        """The learning rates of Adam to choose from."""
        return self.lr if isinstance(self.lr, list) else [self.lr]


class DRTLOptions(Section, frozen=True, kw_only=True):
    """``drtl``: the settings of this plug-in."""

    removed: ClassVar[Mapping[str, str]] = {
        'target_weight': "drtl.adapt trains on the target's pairs; during training, drtl.camera_fit uses them."
    }

    pipeline: Annotated[
        Literal['pretrain', 'meta'], Meta(description="Which of the paper's two pipelines trains net_g.")
    ] = 'meta'
    weighting: WeightingOptions = WeightingOptions()
    inner: InnerOptions = InnerOptions()
    adapt: AdaptOptions = AdaptOptions()
    camera_fit: Annotated[
        bool,
        Meta(
            description="Fit the camera's degradation to the target's pairs. The fit is one more auxiliary task, and "
            "auxiliary GT images are blurred to the sharpness of the camera's GT."
        ),
    ] = True
    hooks: Annotated[
        list[dict[str, Any]],
        Meta(description='Meta-trainer hooks by type: settings of the default hooks, and hooks of your own.'),
    ] = msgspec.field(default_factory=list)

    @classmethod
    def from_opt(cls, opt: dict[str, Any]) -> DRTLOptions:
        """Parse ``opt['drtl']``.

        Raises:
            OptionError: Unknown key, wrong type, value out of range, or options that contradict each other.
        """
        options = parse_section(cls, opt.get('drtl'), 'drtl')
        inner, adapt = options.inner, options.adapt
        if isinstance(inner.steps, list) and (len(inner.steps) != 2 or inner.steps[0] > inner.steps[1]):
            raise OptionError(f'drtl.inner.steps: expected one number or [low, high], got {inner.steps}.')
        if inner.rate_lr > 0 and (inner.algorithm == 'reptile' or options.pipeline == 'pretrain'):
            raise OptionError('drtl.inner.rate_lr: only pipeline: meta with maml or fomaml learns step sizes.')
        if inner.checkpoint and (inner.algorithm != 'maml' or options.pipeline == 'pretrain'):
            raise OptionError('drtl.inner.checkpoint: only pipeline: meta with maml stores graphs to recompute.')
        if options.pipeline == 'meta' and inner.algorithm == 'reptile':
            if inner.fewest_steps < 2:
                raise OptionError('drtl.inner.steps: reptile needs at least 2; they alternate support and query.')
            if inner.parameters != ['*']:
                raise OptionError(
                    'drtl.inner.parameters: reptile trains only what its inner loop adapts; remove this or use maml.'
                )
        if not adapt.rates:
            raise OptionError('drtl.adapt.lr: the list is empty.')
        if not adapt.folds and len(adapt.rates) > 1:
            raise OptionError('drtl.adapt.lr: only with drtl.adapt.folds can a list be chosen from; give one rate.')
        if adapt.folds == 1:
            raise OptionError('drtl.adapt.folds: at least 2 parts are needed to hold out one; 0 turns it off.')
        for key, is_given, reason in (
            ('early_stop', adapt.early_stop, 'folds choose how far to adapt; remove one of the two.'),
            ('replay', adapt.replay > 0, 'it replays GT and camera fit of pairs that folds hold out; set it to 0.'),
            ('optimizer', adapt.optimizer == 'inner', 'folds choose a learning rate of Adam; set adam.'),
        ):
            if adapt.folds and is_given:
                raise OptionError(f'drtl.adapt.{key}: {reason}')
        if 0 < adapt.replay < 1 and adapt.batch_size < 2:
            raise OptionError(
                'drtl.adapt.batch_size: replay needs at least 2 patches per step, or drtl.adapt.replay: 0.'
            )
        return options


class TargetOptions(Section, frozen=True, kw_only=True):
    """``datasets.train.target``: the support set, K pairs of the target camera."""

    dataroot_gt: Annotated[str, Meta(description='Folder or .lmdb of GT images.')]
    dataroot_lq: Annotated[str, Meta(description='Folder or .lmdb of LQ images.')]
    num_shot: Annotated[int, Meta(ge=1, description='K, the number of pairs.')] = 5
    seed: Annotated[int, Meta(description='Seed for choosing K pairs if there are more than K.')] = 0
    names: Annotated[
        list[str] | None, Meta(description='Names of the pairs to use, without extension; replaces seed and num_shot.')
    ] = None
    meta_info_file: Annotated[str | None, Meta(description='Text file that lists the images, as in BasicSR.')] = None
    filename_tmpl: Annotated[
        str, Meta(description='Template that turns GT names into LQ names, as in BasicSR, e.g. {}x4.')
    ] = '{}'
    io_backend: Annotated[dict[str, Any], Meta(description='type: disk or lmdb.')] = msgspec.field(
        default_factory=_disk
    )


class TaskDatasetOptions(Section, frozen=True, kw_only=True):
    """``datasets.train`` with ``type: DistortionTaskDataset``."""

    removed: ClassVar[Mapping[str, str]] = {'camera_fit': 'set drtl.camera_fit.'}

    name: Annotated[str, Meta(description='Name of the dataset in the log.')]
    type: Annotated[str, Meta(description='DistortionTaskDataset.')]
    dataroot_gt: Annotated[str, Meta(description='Folder or .lmdb of GT images for the auxiliary tasks.')]
    meta_info_file: Annotated[str | None, Meta(description='Text file that lists the images, as in BasicSR.')] = None
    io_backend: Annotated[dict[str, Any], Meta(description='type: disk or lmdb.')] = msgspec.field(
        default_factory=_disk
    )
    gt_size: Annotated[int, Meta(ge=8, description='Side of the GT patches in pixels; a multiple of scale.')] = 128
    num_support: Annotated[int, Meta(ge=1, description='Support patches per episode.')] = 4
    num_query: Annotated[int, Meta(ge=1, description='Query patches per episode.')] = 4
    num_episodes: Annotated[
        int, Meta(ge=1, description='Number of distinct episodes; each depends only on seed and its index.')
    ] = 1_000_000
    seed: Annotated[
        int, Meta(description='Seed of the episodes. `basicsr train` uses manual_seed if this is not given.')
    ] = 0
    use_hflip: Annotated[bool, Meta(description='Flip patches horizontally at random.')] = True
    use_rot: Annotated[bool, Meta(description='Rotate patches by multiples of 90 degrees at random.')] = True
    distortions: Annotated[
        Any, Meta(description='The auxiliary tasks: a list, or default for the built-in library.')
    ] = 'default'
    target: Annotated[TargetOptions | None, Meta(description='The support set of the target camera.')] = None
    image_cache_mb: Annotated[
        float,
        Meta(
            ge=0,
            le=LARGEST,
            description='Memory in MiB for decoded images, shared by the loader processes and the model (per GPU). '
            'Images that fit are decoded once.',
        ),
    ] = 512
    batch_size_per_gpu: Annotated[int, Meta(ge=1, description='Episodes per step, the meta batch.')] = 4
    num_worker_per_gpu: Annotated[int, Meta(ge=0, description='Loader processes.')] = 1
    prefetch_mode: Annotated[
        Literal['cpu', 'cuda'] | None, Meta(description='Load batches ahead; cuda also copies them to the GPU.')
    ] = None
    num_prefetch_queue: Annotated[int, Meta(ge=1, description='Batches to load ahead with prefetch_mode: cpu.')] = 1
    pin_memory: Annotated[bool, Meta(description='Use pinned memory with prefetch_mode: cuda.')] = False
    persistent_workers: Annotated[bool, Meta(description='Keep loader processes alive between epochs.')] = False
    phase: Annotated[str, Meta(description='Set by BasicSR.')] = 'train'
    scale: Annotated[int, Meta(ge=1, description='Set by BasicSR.')] = 1
