"""Pre-training and meta-learning with relation-weighted gradients."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from basicsr.archs import build_network
from basicsr.data import build_dataset
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, tensor2img
from basicsr.utils.dist_util import master_only
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from drtl_plugin.errors import DataError, OptionError, unknown
from drtl_plugin.hooks.base import build_hooks
from drtl_plugin.meta.adaptation import adaptation, best_step, last
from drtl_plugin.meta.learner import (
    accumulate,
    functional_loss,
    matching_names,
    outer_gradient,
    trainable_parameters,
)
from drtl_plugin.models.adversary import adversarial_backward, build_adversary, check_losses
from drtl_plugin.options.parse import DRTLOptions
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY, RelationEvidence
from drtl_plugin.relation.graph import KnowledgeGraph
from drtl_plugin.relation.weights import effective_number, relation_weights
from drtl_plugin.report.html import Comparison, Page, Table, illustrations_of_folder, write_html
from drtl_plugin.report.tables import (
    AFTER,
    BEFORE,
    BICUBIC,
    PASSES,
    TEST_PASSES,
    ComparedCrop,
    command_line,
    compared_crop,
    comparison_picture,
    duration_in_words,
    gains_of_results,
    network_in_words,
    psnr_names,
    results_by_pass,
    results_table,
    write_image_metrics,
)
from drtl_plugin.runtime import checkpoints
from drtl_plugin.runtime.device import compile_network, computes_bfloat16, lay_out, training_format
from drtl_plugin.runtime.distributed import average_gradients, broadcast, of_first_process
from drtl_plugin.runtime.progress import Pulse, aside, progress, stage
from drtl_plugin.runtime.tiles import restore
from drtl_plugin.runtime.weights import input_multiple
from drtl_plugin.tasks.camera_fit import CameraFit, fit_camera
from drtl_plugin.tasks.patches import paired_patches

# Images of each validation set that go into the comparison picture.
_NUM_COMPARED = 3
# Auxiliary patches whose sharpness that of the camera's ground truth is compared with.
_NUM_PHOTOGRAPHS = 64
# Patches of the held-out pairs that early stopping judges by.
_NUM_HELD_OUT = 32


# What the type of datasets.train must have, beside items like those of DistortionTaskDataset.
EPISODE_INTERFACE = ('options', 'library', 'target_pairs', 'gt_patches')


# The last fit and the seconds that it took, by what it was fitted to.
_FITS: dict[str, tuple[CameraFit, float]] = {}


def _fit_once(pairs: Sequence[tuple[Tensor, Tensor]], photographs: Tensor) -> CameraFit:
    """``fit_camera``, whose half minute a run need not spend twice: it builds its model in rehearsal first."""
    digest = hashlib.sha256()
    for image in (photographs, *itertools.chain.from_iterable(pairs)):
        digest.update(image.contiguous().numpy())
    key = digest.hexdigest()
    if key in _FITS:
        fit, seconds = _FITS[key]
        get_root_logger().info(f'The camera was fitted before this run started, in {seconds:.1f} s.')
        return fit
    started = time.monotonic()
    with stage(f'Fitting the camera ({len(pairs)} pairs)'):
        fit = fit_camera(pairs, photographs)
    _FITS.clear()
    _FITS[key] = fit, time.monotonic() - started
    return fit


def _watched(course: Iterator[nn.Module], watch: Callable[[int, nn.Module], None]) -> Iterator[nn.Module]:
    for step, net in enumerate(course):
        watch(step, net)
        yield net


class _RenamedLoader:
    """A validation loader under another dataset name, so that BasicSR logs each pass under a name of its own.

    It shows progress where BasicSR shows no bar, and keeps the metrics of each image, which BasicSR only adds up.

    Attributes:
        name (str): Of the dataset, with the pass.
        image_name (str): File name, without extension, of the low-quality image that was loaded last.
        metrics (list[tuple[str, dict[str, float]]]): Name and metrics of each image.
    """

    def __init__(self, model: DRTLModel, dataloader, name: str) -> None:
        self._model = model
        self._dataloader = dataloader
        self.name = name
        self.dataset = SimpleNamespace(opt={**dataloader.dataset.opt, 'name': name})
        self.image_name = ''
        self.metrics: list[tuple[str, dict[str, float]]] = []

    def __iter__(self) -> Iterator[dict]:
        model, pulse = self._model, Pulse()
        sums: dict[str, float] = getattr(model, 'metric_results', {})
        for count, data in enumerate(self._dataloader, 1):
            self.image_name = Path(data['lq_path'][0]).stem
            model.metric_results = dict.fromkeys(sums, 0)
            yield data
            self.metrics.append((self.image_name, model.metric_results))
            sums = {metric: value + model.metric_results[metric] for metric, value in sums.items()}
            if not model.opt['val'].get('pbar'):
                pulse.beat(f'Validating {self.name}: {count} of {len(self)} images')
        model.metric_results = sums

    def __len__(self) -> int:
        return len(self._dataloader)


@MODEL_REGISTRY.register()
class DRTLModel(SRModel):
    """DRTL (arXiv 2111.13078): learns from auxiliary tasks, weighted by their relation to a target camera.

    ``SRModel`` with two pipelines (``drtl.pipeline``): ``pretrain`` takes an optimiser step on
    ``g = (1/N) Σ w_i ∇L_i(θ)``, ``meta`` on ``g = (1/B) Σ w_i ∇_θ L_i^qry(θ_i')``. The relation, the graph, the
    adaptation and the records are meta-trainer hooks (:mod:`drtl_plugin.hooks.base`), to which the model is the
    runner. Without training (``basicsr test``) it is ``SRModel``, pads for networks with a ``window_size``, and
    compares with bicubic upsampling. ``val.tile`` and ``val.overlap`` restore large images tile by tile.

    ``network_d`` and ``train.gan_opt`` add a GAN to ``pretrain`` and to adaptation, which starts from a copy of the
    discriminator (:mod:`drtl_plugin.models.adversary`).

    Validation has three passes, named in log and TensorBoard after the dataset: ``NAME_bicubic`` (upsampling, once),
    ``NAME`` (before adaptation), ``NAME_adapted`` (after). ``net_g_adapted`` is saved beside ``net_g``.

    Args:
        opt (dict): BasicSR's options for ``SRModel``, with ``datasets.train`` of type ``DistortionTaskDataset`` (or
            another registered type with items and attributes like its own, :data:`EPISODE_INTERFACE`) and a ``drtl``
            section (:class:`drtl_plugin.options.parse.DRTLOptions`). ``train.amp: bf16`` computes networks in
            bfloat16 (autocast) while training and adapting, where the device can; weights stay in single precision.
            ``train.compile`` has ``net_g`` compiled for training.

    Attributes:
        camera_fit (CameraFit | None): Where ``drtl.camera_fit`` is on and there is a target; also
            the last task of ``library``.
        graph (KnowledgeGraph | None): Set by the RelationHook.
        weights (Tensor): Gradient weights of the auxiliary tasks, ``(N,)``, mean 1.
        net_g_adapted (nn.Module | None): Set by the FewShotAdaptHook.
        adversary (Adversary | None): The discriminator and its loss, where there is ``network_d``.
        validation_results (dict): Metrics by dataset name (with the pass), of the last validation.
        compared (dict[str, list[ComparedCrop]]): Crops of the first images of the same, by dataset name and pass.
        tb_logger (SummaryWriter | None): For hooks to write to; set by a training run, in its first process.
        iter, max_iters (int): As in mmengine: the number of the current iteration, from 0, and of all.
        losses_of_step (dict): Of the last step, by name, as tensors on the device.
        amp, compiled (bool): Whether networks compute in bfloat16, and ``net_g`` is compiled, while training.
        memory_format (torch.memory_format): The layout of networks while training.
        skip_step (bool): For hooks to set before an optimiser's step that is better not taken.
        stopping (bool): Whether the run was told to end, in a hurry; then nothing is adapted before it is saved.

    Raises:
        OptionError: If the ``drtl`` section or the hooks are not valid.
        DataError: If the training data is not.
    """

    def __init__(self, opt: dict) -> None:
        self._began, self._resumed_at = time.monotonic(), 0
        self.drtl = DRTLOptions.from_opt(opt)
        self.validation_results: dict[str, dict[str, float]] = {}
        self.net_g_adapted: nn.Module | None = None
        self._pass = BEFORE
        self.compared: dict[str, list[ComparedCrop]] = {}
        self.tb_logger: SummaryWriter | None = None
        super().__init__(opt)
        if not self.is_train:
            lay_out(self.net_g, torch.channels_last)

    # ---- setting up ------------------------------------------------------------------------------------------- #

    def init_training_settings(self) -> None:
        """``SRModel``'s training settings, the auxiliary tasks, the DRN and the hooks."""
        check_losses(self.opt, self.trains_by_gan)
        self.adversary = build_adversary(self) if self.opt.get('network_d') else None
        super().init_training_settings()
        train = self.opt['train']
        self.further_losses = {
            f'l_{name}': build_loss(train[f'{name}_opt']).to(self.device)
            for name in ('msssim', 'frequency')
            if train.get(f'{name}_opt')
        }
        # BasicSR builds the loader's dataset elsewhere; this one, with the same options, feeds the hooks.
        self.task_data = build_dataset(self.opt['datasets']['train'])
        self.library = self.task_data.library
        self.target_pairs = self.task_data.target_pairs
        self.camera_fit: CameraFit | None = None
        if self.drtl.camera_fit and self.target_pairs is not None:
            self._fit_camera()
        if self.drtl.adapt.early_stop and self.target_pairs is not None and len(self.target_pairs) < 2:
            raise OptionError('drtl.adapt.early_stop: holding pairs out takes at least 2 pairs; there is 1.')
        self.graph: KnowledgeGraph | None = None
        self.weights = self._with_fit_share(torch.ones(len(self.library)))
        self.iter, self.max_iters = 0, int(self.opt['train']['total_iter'])
        self.num_update = 0
        self.stopping = False
        self._started = False
        self._build_relation_net()
        self.hooks = build_hooks(self.drtl.hooks)

    @property
    def trains_by_gan(self) -> bool:
        """Whether training steps, beside those of adaptation, can be those of a GAN."""
        return self.drtl.pipeline == 'pretrain'

    def _accelerate(self) -> None:
        """Bfloat16 where it is asked for, the layout in which convolutions are fastest, and compiling."""
        train = self.opt['train']
        self.amp = train.get('amp') == 'bf16'
        if self.amp and not computes_bfloat16(self.device):
            get_root_logger().warning(
                'train.amp: this device cannot compute in bfloat16, only imitate it, much slower; it computes in '
                'single precision instead.'
            )
            self.amp = False
        # Pre-training in full precision with uniform weights is, bit for bit, what SRModel does.
        is_srmodel = self.drtl.pipeline == 'pretrain' and self.drtl.weighting.relation == 'uniform' and not self.amp
        wanted = torch.contiguous_format if is_srmodel else training_format(self.device)
        self.memory_format = lay_out(self.net_g, wanted)
        if hasattr(self, 'net_g_ema'):
            self.net_g_ema.to(memory_format=self.memory_format)
        # Without steps there is nothing to compile: copies of net_g, which adapt, are not.
        self.compiled = train.get('compile', False) and int(train['total_iter']) > 0
        if self.compiled:
            if self.drtl.pipeline == 'meta' and self.drtl.inner.algorithm == 'maml':
                raise OptionError(
                    'train.compile: what torch.compile makes cannot be differentiated twice, as maml does; leave it '
                    'out, or take another drtl.inner.algorithm.'
                )
            compile_network(self.net_g, self.device)

    def uncompiled(self) -> AbstractContextManager:
        """A context in which ``net_g`` is not compiled for what it is given: images of many sizes, say."""
        compiled = self.is_train and self.compiled
        return torch.compiler.set_stance('force_eager') if compiled else nullcontext()

    def _fit_camera(self) -> None:
        """Fit the camera, or read a fit; it becomes the last of the auxiliary tasks."""
        load_path = self.opt['path'].get('pretrain_camera_fit')
        if load_path is not None:
            try:
                self.camera_fit = CameraFit.from_state(checkpoints.read(load_path, 'path.pretrain_camera_fit'))
            except ValueError:
                raise DataError(f'path.pretrain_camera_fit: {load_path} is not a camera fit.') from None
            if self.camera_fit.scale != self.library.scale:
                raise OptionError(
                    f'path.pretrain_camera_fit: {load_path} is of scale {self.camera_fit.scale}, not of '
                    f'{self.library.scale}.'
                )
        else:
            generator = torch.Generator().manual_seed(self.opt['manual_seed'])
            photographs = self.task_data.gt_patches(_NUM_PHOTOGRAPHS, generator)
            try:
                self.camera_fit = of_first_process(lambda: _fit_once(self.target_pairs, photographs))
            except DataError as error:
                raise DataError(f'drtl.camera_fit: {error} Leave it out by camera_fit: false.') from None
        self.library = self.library.with_task(self.camera_fit)

    def _auxiliary_gt(self, gt: Tensor) -> Tensor:
        """Auxiliary photographs on the model's device, as soft as the camera's ground truth where that was fitted."""
        gt = gt.to(self.device, non_blocking=True)
        return gt if self.camera_fit is None else self.camera_fit.ground_truth(gt)

    def setup_optimizers(self) -> None:
        """``SRModel``'s optimiser, the inner loop's step sizes, and an optimiser for these where they are learned."""
        self._accelerate()  # before all that takes its layout from the weights
        super().setup_optimizers()
        inner = self.drtl.inner
        parameters = trainable_parameters(self.get_bare_model(self.net_g))
        names = matching_names(parameters, inner.parameters, 'drtl.inner.parameters')
        self.inner_rates: dict[str, float | Tensor] = dict.fromkeys(names, inner.lr)
        if self.drtl.pipeline == 'meta' and inner.rate_lr > 0:
            self.inner_rates = {name: torch.full_like(parameters[name], inner.lr, requires_grad=True) for name in names}
            self.optimizer_rates = torch.optim.Adam(self.inner_rates.values(), lr=inner.rate_lr)
            self.optimizers.append(self.optimizer_rates)
        if self.adversary is not None:
            self.optimizer_d = self.make_optimizer_d(self.net_d)
            self.optimizers.append(self.optimizer_d)
        load_path = self.opt['path'].get('pretrain_inner_rates')
        if load_path is not None:
            key = 'path.pretrain_inner_rates'
            content = checkpoints.read(load_path, key)
            self._set_inner_rates(checkpoints.weights_in(content, load_path, key, ['params'])[1])

    def make_optimizer_d(self, net_d: nn.Module) -> torch.optim.Optimizer:
        """A new optimiser of a discriminator, as ``train.optim_d`` says."""
        options = dict(self.opt['train']['optim_d'])
        return self.get_optimizer(options.pop('type'), net_d.parameters(), **options)

    def _set_inner_rates(self, rates: dict[str, Tensor]) -> None:
        """Take rates that were learned before.

        Raises:
            OptionError: If they are of other parameters than ``drtl.inner.parameters`` chooses.
        """
        if set(rates) != set(self.inner_rates):
            raise OptionError('drtl.inner: the step sizes that were learned before are those of other parameters.')
        for name, rate in rates.items():
            if self.learns_rates:
                self.inner_rates[name].data.copy_(rate)
            else:
                self.inner_rates[name] = rate.to(self.device)

    @property
    def learns_rates(self) -> bool:
        """Whether the inner loop's step sizes are learned (Meta-SGD)."""
        return hasattr(self, 'optimizer_rates')

    def _build_relation_net(self) -> None:
        relation = self.drtl.weighting.relation
        if relation not in ESTIMATOR_REGISTRY:
            raise unknown('estimator', relation, ESTIMATOR_REGISTRY.keys(), 'drtl.weighting.relation')
        self.net_r, self.net_r_is_trained = None, False
        if self.drtl.weighting.relation != 'embedding' or self.target_pairs is None:
            return
        if self.opt.get('network_r') is None:
            raise OptionError("network_r is missing: drtl.weighting.relation 'embedding' needs a DRN.")
        self.net_r = build_network(self.opt['network_r']).to(self.device).eval()
        load_path = self.opt['path'].get('pretrain_network_r')
        window = getattr(self.net_r, 'window', 1)
        if self.task_data.options.gt_size < window * self.library.scale:
            raise OptionError(
                f'datasets.train.gt_size: network_r looks at windows of {window} low-quality pixels, so at scale '
                f'{self.library.scale} gt_size must be at least {window * self.library.scale}.'
            )
        if load_path is not None:
            self.load_network(self.net_r, load_path, self.opt['path'].get('strict_load_r', True))
            self.net_r_is_trained = True

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Move a network to the device; with several processes, they begin with the first one's weights.

        Without ``DistributedDataParallel``: the outer gradient is no ``backward``. It is averaged by
        :func:`drtl_plugin.runtime.distributed.average_gradients`, as that of pre-training is.
        """
        net = net.to(self.device)
        if self.opt['dist']:
            broadcast([*net.parameters(), *net.buffers()])
        return net

    def call_hook(self, stage: str, **arguments) -> None:
        """Call a stage of all hooks, in order of their priorities."""
        for hook in self.hooks:
            # A plain mmengine hook has all stages but before_optimizer_step.
            method = getattr(hook, stage, None)
            if method is not None:
                method(self, **arguments)

    def start(self) -> None:
        """Call the hooks' ``before_train``, once: the DRN and the first graph."""
        if not self._started:
            with aside():
                self.call_hook('before_train')
            self._started = True

    # ---- data ------------------------------------------------------------------------------------------------- #

    def feed_data(self, data: dict) -> None:
        """Take a validation image (``lq``, ``gt``), or episodes, whose low-quality patches are made here."""
        if 'support_gt' not in data:
            super().feed_data(data)
            return
        self.start()
        seeds = [self._episode_seeds(index) for index in data['index'].tolist()]
        if self.drtl.weighting.mode == 'sampling':
            generators = [torch.Generator().manual_seed(seed) for seed, _ in seeds]
            self.episode_tasks = [torch.multinomial(self.weights, 1, generator=g).item() for g in generators]
        else:
            self.episode_tasks = data['task'].tolist()
        gt = torch.cat([data['support_gt'], data['query_gt']], dim=1)
        gt = self._auxiliary_gt(gt.flatten(0, 1)).view(gt.shape)
        self.num_support = data['support_gt'].shape[1]
        self.episode_gt = gt
        generators = [torch.Generator(self.device).manual_seed(seed) for _, seed in seeds]
        self.episode_lq = torch.stack(
            [self.library.tasks[task](*episode) for task, *episode in zip(self.episode_tasks, gt, generators)]
        )
        if self.drtl.target_weight > 0:
            self.target_batch = tuple(
                data[key].flatten(0, 1).to(self.device, non_blocking=True) for key in ('target_lq', 'target_gt')
            )

    def _episode_seeds(self, index: int) -> list[int]:
        """Of an episode's task and of its distortion, whichever process learns from it."""
        sequence = np.random.SeedSequence([self.opt['manual_seed'], self.num_update, index])
        return [int(word) >> 1 for word in sequence.generate_state(2, np.uint64)]

    def generators(self, purpose: str) -> tuple[torch.Generator, torch.Generator]:
        """New generators, whose draws depend only on ``manual_seed``, the number of updates and the purpose.

        So a training state need not hold a generator's state, which differs in size between CPU and GPU.

        Args:
            purpose (str): Draws for different purposes are independent.

        Returns:
            tuple[torch.Generator, torch.Generator]: One on the CPU, which draws patches, and one on the model's
            device, which draws distortions.
        """
        entropy = [self.opt['manual_seed'], self.num_update]
        sequence = np.random.SeedSequence(entropy, spawn_key=tuple(purpose.encode()))
        patch_seed, distortion_seed = (int(word) >> 1 for word in sequence.generate_state(2, np.uint64))
        return (
            torch.Generator().manual_seed(patch_seed),
            torch.Generator(self.device).manual_seed(distortion_seed),
        )

    def auxiliary_pairs(
        self, num: int, patch_generator: torch.Generator, distortion_generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The same contents under every auxiliary task.

        Args:
            num (int): P, number of contents.
            patch_generator, distortion_generator (torch.Generator): From :meth:`generators`.

        Returns:
            tuple[Tensor, Tensor]: gt ``(P, 3, s h, s w)`` and lq ``(N, P, 3, h, w)``.
        """
        gt = self._auxiliary_gt(self.task_data.gt_patches(num, patch_generator))
        return gt, torch.stack([task(gt, distortion_generator) for task in self.library.tasks])

    def relation_evidence(self, num: int) -> RelationEvidence:
        """Auxiliary and target pairs for the relation estimators; ``num`` contents of each.

        They depend on ``manual_seed`` and the number of updates, so a resumed run draws the same ones.
        """
        patch_generator, distortion_generator = self.generators('relation evidence')
        gt, lq = self.auxiliary_pairs(num, patch_generator, distortion_generator)
        target_lq, target_gt = self._target_patches(num, patch_generator)
        return RelationEvidence(lq, gt, target_lq, target_gt)

    def _target_patches(
        self, num: int, generator: torch.Generator, pairs: Sequence[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Patches of the support pairs, or of some of them."""
        options = self.task_data.options
        lq_size = options.gt_size // self.library.scale
        pairs = self.target_pairs if pairs is None else pairs
        lq, gt = paired_patches(pairs, num, lq_size, generator, options.use_hflip, options.use_rot)
        return lq.to(self.device, non_blocking=True), gt.to(self.device, non_blocking=True)

    # ---- training --------------------------------------------------------------------------------------------- #

    def set_graph(self, graph: KnowledgeGraph) -> None:
        """Set the knowledge graph, and the weights that follow from it."""
        weighting = self.drtl.weighting
        self.graph = graph
        weights = relation_weights(graph.relation, weighting.effective_tasks, weighting.temperature, weighting.floor)
        self.weights = self._with_fit_share(weights)

    @property
    def fit_share(self) -> float | None:
        """Share of the total weight that the camera fit, the last task, has whatever its relation; None without fit."""
        return None if self.camera_fit is None else self.drtl.weighting.fit_share

    def _with_fit_share(self, weights: Tensor) -> Tensor:
        """Weights of mean 1, of which the camera fit, the last task, has its share beforehand."""
        share = self.fit_share
        if share is None:
            return weights
        weights = (1 - share) * weights
        weights[-1] += share * len(weights)
        return weights

    def precision(self) -> torch.autocast:
        """The context for a forward pass and its loss, by ``train.amp``: autocast to bfloat16, or plain.

        Backward passes run outside of it: autograd computes each gradient in the type of its forward operation.
        """
        # Weights change between the inner loop's forward passes: no copies of them may be kept.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp, cache_enabled=False)

    def _losses(self, output: Tensor, gt: Tensor) -> tuple[Tensor, OrderedDict]:
        """``SRModel``'s losses, MS-SSIM and frequency: their sum, and each by name."""
        losses = OrderedDict()
        output = output.float()
        if self.cri_pix:
            losses['l_pix'] = self.cri_pix(output, gt)
        if self.cri_perceptual:
            l_percep, l_style = self.cri_perceptual(output, gt)
            losses.update({k: v for k, v in (('l_percep', l_percep), ('l_style', l_style)) if v is not None})
        losses.update((name, criterion(output, gt)) for name, criterion in self.further_losses.items())
        return sum(losses.values()), losses

    def criterion(self, output: Tensor, gt: Tensor) -> Tensor:
        """The loss of the option file, but for a GAN's: a scalar for ``output`` and ``gt`` of ``(B, 3, H, W)``."""
        return self._losses(output, gt)[0]

    def optimize_parameters(self, current_iter: int) -> None:
        """One optimiser step on the relation-weighted gradient of the episodes."""
        self.iter = current_iter - 1
        self.call_hook('before_train_iter', batch_idx=self.iter)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        # In sampling mode the weights have had their say in which tasks were drawn.
        sampling = self.drtl.weighting.mode == 'sampling'
        weights = [1.0 if sampling else self.weights[task].item() for task in self.episode_tasks]
        step = self._pretrain_step if self.drtl.pipeline == 'pretrain' else self._meta_step
        losses = step(weights)
        if self.drtl.target_weight > 0:
            lq, gt = self.target_batch
            with self.precision():
                loss, _ = self._losses(self.net_g(lq), gt)
            (self.drtl.target_weight * loss).backward()
            losses['l_target'] = loss.detach()
        average_gradients(self.trained_parameters())
        self.losses_of_step = losses
        self.log_dict = OrderedDict(**losses, effective_tasks=effective_number(self.weights))
        self.skip_step = False
        self.call_hook('before_optimizer_step', batch_idx=self.iter, outputs=self.log_dict)
        self.num_update += 1
        if not self.skip_step:
            for optimizer in self.optimizers:
                optimizer.step()
            if self.ema_decay > 0:
                self.model_ema(decay=self.ema_decay)
        self.call_hook('after_train_iter', batch_idx=self.iter, outputs=self.log_dict)

    def trained_parameters(self) -> Iterator[Tensor]:
        """What the optimisers change."""
        return (p for optimizer in self.optimizers for group in optimizer.param_groups for p in group['params'])

    def get_current_log(self) -> OrderedDict:
        """Scalars of the last step: losses, averaged over the processes, and what hooks have added to ``log_dict``.

        Only here they are fetched from the device.
        """
        return OrderedDict({**self.log_dict, **self.reduce_loss_dict(self.losses_of_step)})

    def _pretrain_step(self, weights: list[float]) -> OrderedDict:
        """``g = (1/N) Σ w_i ∇L_i(θ)`` over all patches of the episodes.

        The paper (arXiv 2111.13078) names this pipeline; the formula is our reconstruction.
        """
        # With equal weights, one loss over all patches, as SRModel takes it, is the mean of the tasks' losses, unless
        # losses are sums.
        averaged = (self.opt['train'].get('pixel_opt') or {}).get('reduction', 'mean') == 'mean'
        log: OrderedDict = OrderedDict()
        with self.precision():
            output = self.net_g(self.episode_lq.flatten(0, 1))
            if averaged and all(weight == 1 for weight in weights):
                total, log = self._losses(output, self.episode_gt.flatten(0, 1))
            else:
                total = 0
                for weight, out, gt in zip(weights, output.view_as(self.episode_gt), self.episode_gt):
                    loss, losses = self._losses(out, gt)
                    total = total + weight / len(weights) * loss
                    for name, value in losses.items():
                        log[name] = log.get(name, 0) + value.detach() / len(weights)
        log = OrderedDict((name, value.detach()) for name, value in log.items())
        if self.adversary is None:
            total.backward()
        else:
            log.update(self.adversary.backward(total, output, self.episode_gt.flatten(0, 1), self.iter + 1))
        return log

    def _meta_step(self, weights: list[float]) -> OrderedDict:
        """``g = (1/B) Σ w_i ∇_θ L_i^qry(θ_i')`` task by task.

        The paper (arXiv 2111.13078) names this pipeline; the formula is our reconstruction.
        """
        inner = self.drtl.inner
        net = self.get_bare_model(self.net_g)
        parameters = trainable_parameters(net)
        loss = functional_loss(net, self.criterion, self.precision)
        mean_query_loss = 0
        for weight, lq, gt in zip(weights, self.episode_lq, self.episode_gt):
            support, query = ((lq[part], gt[part]) for part in (slice(self.num_support), slice(self.num_support, None)))
            outer = outer_gradient(
                loss,
                parameters,
                support,
                query,
                self.inner_rates,
                inner.steps,
                inner.algorithm,
                inner.checkpoint,
            )
            accumulate(parameters, outer.parameters, weight / len(weights))
            accumulate(self.inner_rates, outer.rates, weight / len(weights))
            mean_query_loss = mean_query_loss + outer.query_loss / len(weights)
            del outer  # gradients as large as the network, while the next task's are computed
        return OrderedDict(l_query=mean_query_loss)

    # ---- adaptation, validation ------------------------------------------------------------------------------- #

    def trained_network(self) -> nn.Module:
        """What is tested: the moving average where there is one."""
        return self.net_g_ema if hasattr(self, 'net_g_ema') else self.get_bare_model(self.net_g)

    def adapt_to_target(self, watch: Callable[[int, nn.Module], None] | None = None) -> None:
        """Adapt a copy of the network to the target's support set; see ``net_g_adapted``.

        The patches are drawn from generators of their own, so that adapting leaves the course of training alone.

        Args:
            watch (Callable | None): Called with the number of steps and the adapted network, before the first step
                and after each; it must not change the network.
        """
        options = self.drtl.adapt
        pairs, steps = self.target_pairs, options.steps
        if options.early_stop:
            generator = torch.Generator().manual_seed(self.opt['manual_seed'])
            order = torch.randperm(len(pairs), generator=generator).tolist()
            num_held_out = max(1, len(pairs) // 5)
            held_out = self._target_patches(_NUM_HELD_OUT, generator, [pairs[i] for i in order[:num_held_out]])
            course = self.adaptation_course([pairs[i] for i in order[num_held_out:]], steps)
            course = self._shown(course, 'finding the number of adaptation steps', steps)
            with stage(f'Finding the number of adaptation steps ({num_held_out} of {len(pairs)} pairs held out)'):
                steps = best_step(course, lambda net: self.criterion(net(held_out[0]), held_out[1]).item(), steps)
            get_root_logger().info(f'Held-out pairs are restored best after {steps} of {options.steps} steps.')
        course = self._shown(self.adaptation_course(pairs, steps), 'adaptation', steps)
        with stage(f'Adapting to the target ({len(pairs)} pairs, {steps} steps)'):
            self.net_g_adapted = last(course if watch is None else _watched(course, watch))

    def _shown(self, course: Iterator[nn.Module], name: str, steps: int) -> Iterator[nn.Module]:
        """An adaptation's course with its progress shown, which ends early when the run is told to stop."""
        yield next(course)  # before the first step
        for net in progress(course, name, steps):
            yield net
            if self.stopping:
                return

    def adaptation_course(self, pairs: Sequence[tuple[Tensor, Tensor]], steps: int) -> Iterator[nn.Module]:
        """The course of an adaptation to some of the support pairs, as ``drtl.adapt`` says."""
        options = self.drtl.adapt
        generator = torch.Generator().manual_seed(self.opt['manual_seed'])
        synthesis = torch.Generator(self.device).manual_seed(self.opt['manual_seed'])
        num_replayed = round(options.replay * options.batch_size)
        if 0 < options.replay < 1:  # some of both
            num_replayed = min(max(num_replayed, 1), options.batch_size - 1)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(steps):
                batch = []
                if num_replayed < options.batch_size:
                    batch.append(self._target_patches(options.batch_size - num_replayed, generator, pairs))
                if num_replayed:
                    batch.append(self._replayed_patches(num_replayed, pairs, generator, synthesis))
                # Support pairs may be smaller than gt_size.
                sides = [min(images[i].shape[-1] for images in batch) for i in range(2)]
                yield tuple(torch.cat([images[i][..., : sides[i], : sides[i]] for images in batch]) for i in range(2))

        rates = self.inner_rates if options.optimizer == 'inner' else None
        return adaptation(
            self.trained_network(),
            self.criterion,
            batches(),
            options.lr,
            options.ema_decay,
            rates,
            options.rank,
            options.warmup,
            self.precision,
            *([] if self.adversary is None else [adversarial_backward(self)]),
        )

    def _replayed_patches(
        self,
        num: int,
        pairs: Sequence[tuple[Tensor, Tensor]],
        generator: torch.Generator,
        synthesis: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Synthetic patches ``(lq, gt)``: what is replayed while adapting to ``pairs``."""
        if self.drtl.adapt.replay_source == 'support':
            gt = self._target_patches(num, generator, pairs)[1]
            return self.camera_fit(gt, synthesis), gt
        gt = self._auxiliary_gt(self.task_data.gt_patches(num, generator))
        drawn = torch.multinomial(self.weights, num, replacement=True, generator=generator).tolist()
        tasks = self.library.tasks
        return torch.cat([tasks[task](gt[i : i + 1], synthesis) for i, task in enumerate(drawn)]), gt

    def test(self) -> None:
        """Restore ``lq`` by what the current pass validates, as :func:`restore` does."""
        scale = self.opt.get('scale', 1)
        if self._pass == BICUBIC:
            height, width = (extent * scale for extent in self.lq.shape[-2:])
            # With antialias, torch takes MATLAB's a = -0.5; enlarging needs none.
            self.output = F.interpolate(self.lq, size=(height, width), mode='bicubic', antialias=True)
            return
        net = self.net_g_adapted if self._pass == AFTER else self.trained_network()
        window = input_multiple(self.opt['network_g'], scale)
        tiles = {key: value for key, value in (self.opt.get('val') or {}).items() if key in ('tile', 'overlap')}
        training = net.training
        net.eval()
        with self.uncompiled():
            self.output = restore(net, self.lq, scale, window, **tiles)
        net.train(training)

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img) -> None:
        """``SRModel``'s validation, once for each pass."""
        if not self.is_train:
            self._test_dataset(dataloader, current_iter, tb_logger, save_img)
            return
        self.call_hook('before_val')
        name = dataloader.dataset.opt['name']
        passes = [BICUBIC] if name + BICUBIC not in self.validation_results else []
        passes += [BEFORE] + [AFTER] * (self.net_g_adapted is not None)
        visualization = self.opt['path']['visualization']
        for suffix in passes:
            self.compared[name + suffix] = []
            # BasicSR names a training run's images by image and iteration; each pass needs a folder of its own.
            self.opt['path']['visualization'] = visualization + suffix
            self._validate_pass(suffix, dataloader, current_iter, tb_logger, save_img)
        self.opt['path']['visualization'] = visualization
        # There is no best iteration of it.
        getattr(self, 'best_metric_results', {}).pop(name + BICUBIC, None)
        self.call_hook('after_val')

    def _validate_pass(
        self, suffix: str, dataloader, current_iter, tb_logger, save_img
    ) -> list[tuple[str, dict[str, float]]]:
        """``SRModel``'s validation of one pass; returns name and metrics of each image."""
        self._pass = suffix
        loader = self._validated = _RenamedLoader(self, dataloader, dataloader.dataset.opt['name'] + suffix)
        super().nondist_validation(loader, current_iter, tb_logger, save_img and suffix != BICUBIC)
        self.validation_results[loader.name] = dict(getattr(self, 'metric_results', {}))
        self._pass = BEFORE
        return loader.metrics

    def _test_dataset(self, dataloader, current_iter, tb_logger, save_img) -> None:
        """Test the network, and bicubic upsampling where there is ground truth: a table in the log, images in a CSV."""
        options = dataloader.dataset.opt
        passes = [BICUBIC] * (bool(self.opt['val'].get('metrics')) and 'dataroot_gt' in options) + [BEFORE]
        images = {
            TEST_PASSES[suffix]: self._validate_pass(suffix, dataloader, current_iter, tb_logger, save_img)
            for suffix in passes
        }
        if BICUBIC in passes:
            path = Path(self.opt['path']['results_root'], f'metrics_{options["name"]}.csv')
            write_image_metrics(path, images)
            results = {options['name'] + suffix: self.validation_results[options['name'] + suffix] for suffix in passes}
            table = results_table(results, TEST_PASSES)
            get_root_logger().info(f'Mean over {len(dataloader)} images; each of them is in {path}.\n{table}')

    def get_current_visuals(self) -> OrderedDict:
        visuals = super().get_current_visuals()
        if self.is_train and 'gt' in visuals:
            crops = self.compared[self._validated.name]
            if len(crops) < _NUM_COMPARED:
                images = (tensor2img(visuals[key]) for key in ('result', 'gt'))
                crops.append(compared_crop(self._validated.image_name, *images))
        return visuals

    # ---- saving, resuming, ending ----------------------------------------------------------------------------- #

    def save(self, epoch: int, current_iter: int) -> None:
        """Save ``net_g`` (and its average), ``net_g_adapted``, ``net_r``, ``net_d``, and last the training state.

        Where there is a state to resume from, the networks that belong to it are there, too.
        """
        self._hook_state: dict = {}
        self.save_hook_results(current_iter)
        if self.adversary is not None:
            self.save_network(self.net_d, 'net_d', current_iter)
        super().save(epoch, current_iter)

    @master_only
    def save_hook_results(self, current_iter: int) -> None:
        """Call the hooks' ``before_save_checkpoint``, and save the networks that they made."""
        self._hook_state = {}
        self.call_hook('before_save_checkpoint', checkpoint=self._hook_state)
        if self.net_g_adapted is not None and not self.stopping:
            self.save_network(self.net_g_adapted, 'net_g_adapted', current_iter)
        if self.net_r is not None:
            self.save_network(self.net_r, 'net_r', current_iter)
        if self.learns_rates:
            name = f'inner_rates_{"latest" if current_iter == -1 else current_iter}.pth'
            rates = {name: rate.detach() for name, rate in self.inner_rates.items()}
            checkpoints.save({'params': rates}, Path(self.opt['path']['models'], name))

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """BasicSR's training state, with the hooks' state and the learned step sizes."""
        super().save_training_state(
            epoch,
            current_iter,
            **self._hook_state,
            inner_rates={name: rate.detach() for name, rate in self.inner_rates.items() if self.learns_rates},
        )

    def resume_training(self, resume_state: dict) -> None:
        """Take up BasicSR's training state, the learned step sizes and the hooks' state.

        The ``generator`` and ``patch_generator`` that older versions saved are ignored.

        Raises:
            OptionError: If it is the state of another model, of other tasks, or of other step sizes.
        """
        if 'inner_rates' not in resume_state:
            raise OptionError('path.resume_state is not a training state of a DRTLModel.')
        rates = resume_state['inner_rates']
        if bool(rates) != self.learns_rates:
            raise OptionError(
                'drtl.inner.rate_lr: the run to resume did not learn step sizes, or did; leave it as it was.'
            )
        if len(resume_state['optimizers']) != len(self.optimizers):
            raise OptionError('network_d: the run to resume had no discriminator, or had one; leave it as it was.')
        # The schedule is the option file's, which may have been extended; the state says how far in it the run is.
        position = ('last_epoch', '_step_count', '_last_lr', 'base_lrs')
        schedulers = [{key: state[key] for key in position} for state in resume_state['schedulers']]
        super().resume_training({**resume_state, 'schedulers': schedulers})
        if rates:
            self._set_inner_rates(rates)
        self.num_update = self._resumed_at = resume_state['iter']
        self.call_hook('after_load_checkpoint', checkpoint=resume_state)

    def finish(self, modules: Sequence[str] = ()) -> str:
        """End the run, in the first process: call the hooks' ``after_train``, write comparison picture and report.

        Args:
            modules (Sequence[str]): Modules that were imported by ``--import``; the next command needs them, too.

        Returns:
            str: What came out, for the last lines that the user sees.
        """
        self.call_hook('after_train')
        root = Path(self.opt['path']['experiments_root'])
        for dataset in (name[: -len(BICUBIC)] for name in self.compared if name.endswith(BICUBIC)):
            picture = comparison_picture(self.compared, dataset)
            if picture is not None:
                (root / f'comparison_{dataset}.png').write_bytes(cv2.imencode('.png', picture)[1].tobytes())
        self._write_page(root)
        weights = root / 'models' / f'net_g{AFTER if self.net_g_adapted is not None else ""}_latest.pth'
        command = command_line('upscale', '-i', 'IN', '-o', 'OUT', '--weights', weights, modules=modules)
        return (
            f'Weights, knowledge graph, pictures and report.html are in {root}.\n'
            f'Restore photographs: {command}\n{results_table(self.validation_results)}'
        )

    def _write_page(self, root: Path) -> None:
        """Write ``report.html`` from the last validation and the records in the experiment's folder."""
        names = psnr_names((self.opt.get('val') or {}).get('metrics') or {})
        tables = []
        for dataset, rows in results_by_pass(self.validation_results).items():
            metrics = list(rows[BICUBIC])
            columns = ['', *(f'{names[metric]} (dB)' if metric in names else metric for metric in metrics)]
            cells = [[PASSES[suffix], *(f'{row[metric]:.4f}' for metric in metrics)] for suffix, row in rows.items()]
            tables.append(Table(f'Results on {dataset}', columns, cells))
        comparisons = []
        for name in (name for name in self.compared if name.endswith(AFTER)):
            dataset = name[: -len(AFTER)]
            for before, after in zip(self.compared[dataset + BEFORE], self.compared[name]):
                comparisons.append(Comparison(f'{before.name} ({dataset})', before.result, after.result, before.gt))
        facts = {'Network': network_in_words(self.opt['network_g'], self.net_g)}
        if self.num_update:
            facts['Training'] = f'{self.num_update} iterations'
        if self.net_g_adapted is not None:
            adapt = self.drtl.adapt
            most = 'up to ' if adapt.early_stop else ''
            facts['Adaptation'] = f'{most}{adapt.steps} steps on {len(self.target_pairs)} pairs'
        facts['Duration'] = duration_in_words(time.monotonic() - self._began)
        if self._resumed_at:
            facts['Duration'] += f' since the run was resumed at iteration {self._resumed_at}'
        page = Page(
            self.opt['name'],
            gains_of_results(self.validation_results, names),
            'no validation set has ground truth and metrics',
            facts,
            tables,
            comparisons,
            illustrations_of_folder(root, names, self.fit_share),
            {f'Options: {path.name}': path.read_text(encoding='utf-8') for path in sorted(root.glob('*.yml'))},
        )
        write_html(root / 'report.html', page)
