"""Pre-training and meta-learning with relation-weighted gradients, as a BasicSR model."""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from basicsr.data import build_dataset
from basicsr.models.sr_model import SRModel
from basicsr.utils.dist_util import master_only
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from drtl_plugin.data.interface import EpisodeDataset
from drtl_plugin.errors import OptionError
from drtl_plugin.hooks.base import build_hooks, call_hooks
from drtl_plugin.hooks.relation_hook import find_estimator
from drtl_plugin.models.acceleration import Acceleration, accelerate
from drtl_plugin.models.adapter import Adapter
from drtl_plugin.models.adversary import adversarial_backward, build_discriminator, make_adversary
from drtl_plugin.models.camera import check_target, fit_to_target, load_camera
from drtl_plugin.models.episode_synthesis import Episodes, check_training_set
from drtl_plugin.models.inner_rates import InnerRates
from drtl_plugin.models.losses import Losses, check_losses, try_patches
from drtl_plugin.models.relation_net import build_relation_net
from drtl_plugin.models.steps import meta_step, pretrain_step
from drtl_plugin.models.validation import Validator
from drtl_plugin.options.sections import DRTLOptions
from drtl_plugin.relation.graph import KnowledgeGraph
from drtl_plugin.relation.weights import effective_number, reserve_share
from drtl_plugin.report.outcome import Outcome, write_outcome
from drtl_plugin.report.tables import AFTER, BICUBIC
from drtl_plugin.runtime.device import lay_out
from drtl_plugin.runtime.distributed import average_gradients, broadcast
from drtl_plugin.runtime.progress import aside


@MODEL_REGISTRY.register()
class DRTLModel(SRModel):
    """DRTL (arXiv 2111.13078): learns from auxiliary tasks, weighted by their relation to a target camera.

    ``SRModel`` with two pipelines (``drtl.pipeline``): ``pretrain`` takes an optimiser step on
    ``g = (1/B) Σ w_i ∇L_i(θ)``, ``meta`` on ``g = (1/B) Σ w_i ∇_θ L_i^qry(θ_i')``. Meta-trainer hooks measure the
    relation, adapt the network and write the records; the model is their
    :class:`~drtl_plugin.hooks.base.Runner`, which documents the attributes they use. ``basicsr test`` restores as
    ``SRModel`` does, pads for networks with a ``window_size``, and compares with bicubic upsampling.

    Validation has three passes, named in log and TensorBoard after the dataset: ``NAME_bicubic`` (once), ``NAME``
    (before adaptation) and ``NAME_adapted`` (after). ``net_g_adapted`` is saved alongside ``net_g``.

    The parts: ``episodes`` draws tasks and patches, ``adapter`` adapts to the target, ``validator`` runs the passes,
    ``losses`` are those of the option file, ``inner_rates`` are the inner loop's step sizes, ``adversary`` is a GAN's
    discriminator with its loss.

    Args:
        opt (dict): BasicSR's options for ``SRModel``, with a ``drtl`` section
            (:class:`~drtl_plugin.options.sections.DRTLOptions`) and ``datasets.train`` of type
            ``DistortionTaskDataset`` or another :class:`~drtl_plugin.data.interface.EpisodeDataset`.

    Attributes:
        takes_steps (bool): Whether the class trains, rather than only adapts.

    Raises:
        OptionError: If options are invalid or incompatible.
    """

    takes_steps = True

    def __init__(self, opt: dict[str, Any]) -> None:
        self._began, self._resumed_at = time.monotonic(), 0
        self._started = False
        self._hook_state: dict[str, Any] = {}
        self.drtl = DRTLOptions.from_opt(opt)
        self.validator = Validator(opt)
        self.validation_results, self.compared = self.validator.results, self.validator.compared
        self.net_g_adapted: nn.Module | None = None
        self.adaptation: dict[str, Any] | None = None
        self.tb_logger = None
        super().__init__(opt)
        if not self.is_train:
            self.acceleration = Acceleration(self.device)
            lay_out(self.net_g, torch.channels_last)

    def init_training_settings(self) -> None:
        """``SRModel``'s training settings, the losses, the discriminator, the DRN and the hooks."""
        opt, path = self.opt, self.opt['path']
        check_losses(opt, has_gan_steps=self.drtl.pipeline == 'pretrain' or not self.takes_steps)
        find_estimator(self.drtl.weighting.relation)
        self.adversary = None
        if opt.get('network_d'):
            self.net_d = self.model_to_device(build_discriminator(opt['network_d'], opt['manual_seed']))
            self.print_network(self.net_d)
            self.adversary = make_adversary(self.net_d, opt['train'], self.device)
            if path.get('pretrain_network_d') is not None:
                strict, key = path.get('strict_load_d', True), path.get('param_key_d', 'params')
                self.load_network(self.net_d, path['pretrain_network_d'], strict, key)
        super().init_training_settings()
        self.losses = Losses(self, opt['train'], self.device)
        self.net_r, self.net_r_is_trained = build_relation_net(opt, self.drtl, self.device)
        if self.net_r is not None and path.get('pretrain_network_r') is not None:
            self.load_network(self.net_r, path['pretrain_network_r'], path.get('strict_load_r', True))
        self.camera_fit = None
        if self.drtl.camera_fit and path.get('pretrain_camera_fit') is not None:
            self.camera_fit = load_camera(path['pretrain_camera_fit'], opt.get('scale', 1))
        self.episodes: Episodes | None = None
        self.graph: KnowledgeGraph | None = None
        self.iter, self.max_iters, self.num_update = 0, int(opt['train']['total_iter']), 0
        self.stopping = False
        self.hooks = build_hooks(self.drtl.hooks)

    def setup_optimizers(self) -> None:
        """Set up ``SRModel``'s optimiser, and one each for learned inner step sizes and the discriminator, if any."""
        # First, since everything else takes its layout from the weights.
        self.acceleration = accelerate(self.net_g, self.opt['train'], self.drtl, self.device)
        self.precision, self.uncompiled = self.acceleration.precision, self.acceleration.uncompiled
        if hasattr(self, 'net_g_ema'):
            self.net_g_ema.to(memory_format=self.acceleration.memory_format)
        super().setup_optimizers()
        inner = self.drtl.inner
        learns_rates = self.drtl.pipeline == 'meta' and inner.rate_lr > 0
        self.inner_rates = InnerRates(self.net_g, inner, learns_rates)
        if learns_rates:
            self.optimizers.append(torch.optim.Adam(self.inner_rates.logarithms.values(), lr=inner.rate_lr))
        if self.adversary is not None:
            options = dict(self.opt['train']['optim_d'])
            kind = options.pop('type')
            self._make_optimizer_d = lambda net: self.get_optimizer(kind, net.parameters(), **options)
            self.optimizers.append(self._make_optimizer_d(self.net_d))
        load_path = self.opt['path'].get('pretrain_inner_rates')
        if load_path is not None:
            self.inner_rates.load_file(load_path)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Move a network to the device; several processes start with the weights of the first.

        ``DistributedDataParallel`` would not help: it averages gradients in ``backward``, which the outer gradient does
        not call. :func:`~drtl_plugin.runtime.distributed.average_gradients` averages them.
        """
        net = net.to(self.device)
        if self.opt['dist']:
            broadcast([*net.parameters(), *net.buffers()])
        return net

    @functools.cached_property
    def train_set(self) -> EpisodeDataset:
        """The training set. The loop sets the one that it iterates over; BasicSR's own loop does not."""
        return build_dataset(self.opt['datasets']['train'])

    def check_data(self) -> None:
        """Check, before a run starts, that options, networks and losses fit the training set.

        Raises:
            OptionError: If they don't.
            DataError: If a camera is to be fitted to the target's pairs, and cannot be.
        """
        check_training_set(self.train_set, self.drtl, self.net_r)
        if self.drtl.camera_fit and self.camera_fit is None and self.train_set.target_pairs is not None:
            check_target(self.train_set)
        try_patches(self.train_set, self.criterion, getattr(self, 'net_d', None), self.device)

    def prepare(self) -> None:
        """Build what needs the training data, once: the tasks with the camera fit, their weights, and the adapter."""
        if self.episodes is not None:
            return
        check_training_set(self.train_set, self.drtl, self.net_r)
        self.target_pairs = pairs = self.train_set.target_pairs
        seed, drtl = self.opt['manual_seed'], self.drtl
        if pairs is None:
            self.camera_fit = self.net_r = None
        elif drtl.camera_fit and self.camera_fit is None:
            self.camera_fit = fit_to_target(self.train_set, seed)
        self.episodes = Episodes(self.train_set, self.camera_fit, self.device, seed)
        self.library = self.episodes.library
        self.fit_share = None if self.camera_fit is None else drtl.weighting.fit_share
        self.weights = reserve_share(torch.ones(len(self.library)), self.fit_share)
        self.adapter = Adapter(
            self.episodes,
            pairs or (),
            drtl.adapt,
            seed,
            self.criterion,
            self.precision,
            self.inner_rates if drtl.adapt.optimizer == 'inner' else None,
            lambda: self.stopping,
        )
        if self.adversary is not None:
            self.adapter.make_backward = functools.partial(
                adversarial_backward, self.adversary, self.opt['network_d'], self._make_optimizer_d
            )

    def start(self) -> None:
        """Prepare the training data and call the hooks' ``before_train``, once."""
        if not self._started:
            with aside():
                self.prepare()
                call_hooks(self.hooks, 'before_train', self)
            self._started = True

    def feed_data(self, data: dict[str, Any]) -> None:
        """Receive a validation image (``lq``, ``gt``), or episodes, for which tasks are drawn and LQ patches made."""
        if 'support_gt' not in data:
            super().feed_data(data)
            return
        self.start()
        # Tasks are drawn by weight, or drawn uniformly and their gradients weighted.
        weights = self.weights if self.drtl.weighting.mode == 'sampling' else None
        assert self.episodes is not None  # start() has made them
        self.batch = self.episodes.draw(data, weights, self.num_update)

    def criterion(self, output: Tensor, gt: Tensor) -> Tensor:
        """The loss without the GAN loss, which derived models may override.

        Args:
            output, gt (Tensor): ``(B, 3, H, W)``.

        Returns:
            Tensor: A scalar.
        """
        return self.losses(output, gt)

    def _named_losses(self, output: Tensor, gt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """``criterion``, and its parts under the names to log; an overridden one has a single part."""
        if getattr(self.criterion, '__func__', None) is DRTLModel.criterion:
            return self.losses.by_name(output, gt)
        loss = self.criterion(output, gt)
        return loss, {'l_total': loss}

    def optimize_parameters(self, current_iter: int) -> None:
        """One optimiser step on the relation-weighted gradient of the episodes."""
        self.iter = current_iter - 1
        call_hooks(self.hooks, 'before_train_iter', self, batch_idx=self.iter)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.losses_of_step = self.backward(current_iter)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        average_gradients(p for group in groups for p in group['params'])
        self.log_dict = OrderedDict(**self.losses_of_step, effective_tasks=effective_number(self.weights))
        self.skip_step = False
        call_hooks(self.hooks, 'before_optimizer_step', self, batch_idx=self.iter, outputs=self.log_dict)
        self.num_update += 1
        if not self.skip_step:
            for optimizer in self.optimizers:
                optimizer.step()
            if self.ema_decay > 0:
                self.model_ema(decay=self.ema_decay)
        call_hooks(self.hooks, 'after_train_iter', self, batch_idx=self.iter, outputs=self.log_dict)

    def backward(self, current_iter: int) -> OrderedDict[str, Tensor]:
        """Accumulate the gradients of a step; returns its losses by name, on the device."""
        sampling = self.drtl.weighting.mode == 'sampling'
        weights = [1.0 if sampling else self.weights[task].item() for task in self.batch.tasks]
        common = (self.net_g, self.batch, weights)
        if self.drtl.pipeline == 'meta':
            return meta_step(*common, self.criterion, self.precision, self.inner_rates, self.drtl.inner, current_iter)
        are_means = (self.opt['train'].get('pixel_opt') or {}).get('reduction', 'mean') == 'mean'
        return pretrain_step(*common, self._named_losses, self.precision, are_means, self.adversary, current_iter)

    def get_current_log(self) -> OrderedDict[str, float]:
        """The last step's losses, averaged over the processes, and whatever hooks have added to ``log_dict``.

        Losses are copied from the device only here.
        """
        return OrderedDict({**self.log_dict, **self.reduce_loss_dict(self.losses_of_step)})

    def adapt_to_target(self) -> None:
        """Adapt a copy of the network to the target's pairs; it becomes ``net_g_adapted``."""
        self.prepare()
        self.net_g_adapted = self.adapter.adapt(self.trained_network(), self.weights)
        self.adaptation = self.adapter.record()

    def trained_network(self) -> nn.Module:
        """The network to test and to adapt: the moving average, if there is one."""
        return self.net_g_ema if hasattr(self, 'net_g_ema') else self.net_g

    def test(self) -> None:
        """Restore ``lq`` with the network of the current pass."""
        adapted = self.net_g_adapted if self.validator.suffix == AFTER else None
        net = self.trained_network() if adapted is None else adapted
        with self.acceleration.uncompiled():
            self.output = self.validator.restore(self.lq, net)
        self.validator.keep_crop(self.output, getattr(self, 'gt', None))

    def validation(self, dataloader, current_iter, tb_logger, save_img=False) -> None:
        """``SRModel``'s validation; while training, all processes prepare the training data first."""
        if self.is_train:
            self.prepare()
        super().validation(dataloader, current_iter, tb_logger, save_img)

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img) -> None:
        """``SRModel``'s validation, once for each pass."""
        validate = super().nondist_validation
        arguments = (
            lambda loader, saves: validate(loader, current_iter, tb_logger, saves),
            lambda: getattr(self, 'metric_results', {}),
            save_img,
        )
        if not self.is_train:
            self.validator.test(dataloader, *arguments)
            return
        call_hooks(self.hooks, 'before_val', self)
        self.validator.validate(dataloader, self.net_g_adapted is not None, *arguments)
        # Bicubic upsampling has no best iteration.
        getattr(self, 'best_metric_results', {}).pop(dataloader.dataset.opt['name'] + BICUBIC, None)
        call_hooks(self.hooks, 'after_val', self)

    def save(self, epoch: int, current_iter: int) -> None:
        """Save ``net_g`` (and its average), ``net_g_adapted``, ``net_r``, ``net_d``, and the training state last.

        Whenever a state exists, the networks that belong to it therefore exist, too. The training data is prepared
        first, in all processes.
        """
        self.prepare()
        self.save_hook_results(current_iter)
        if self.adversary is not None:
            self.save_network(self.net_d, 'net_d', current_iter)
        super().save(epoch, current_iter)

    @master_only
    def save_hook_results(self, current_iter: int) -> None:
        """Call the hooks' ``before_save_checkpoint``; save adapted network, DRN and learned step sizes."""
        self._hook_state = {}
        call_hooks(self.hooks, 'before_save_checkpoint', self, checkpoint=self._hook_state)
        if self.net_g_adapted is not None and not self.stopping:
            self.save_network(self.net_g_adapted, 'net_g_adapted', current_iter)
        if self.net_r is not None:
            self.save_network(self.net_r, 'net_r', current_iter)
        self.inner_rates.save(self.opt['path']['models'], current_iter)

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """BasicSR's training state, with the hooks' state and the learned step sizes."""
        rates = self.inner_rates.state()
        super().save_training_state(epoch, current_iter, **self._hook_state, inner_rates=rates)

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Restore BasicSR's training state, the learned step sizes and the hooks' state.

        Raises:
            OptionError: If the state belongs to another model, other tasks or other step sizes.
        """
        if 'inner_rates' not in resume_state:
            raise OptionError('path.resume_state is not a training state of a DRTLModel.')
        rates = resume_state['inner_rates']
        if bool(rates) != bool(self.inner_rates.logarithms):
            raise OptionError(
                'drtl.inner.rate_lr: a resumed run must learn step sizes exactly if it did before; restore the value.'
            )
        if len(resume_state['optimizers']) != len(self.optimizers):
            raise OptionError(
                'network_d: a resumed run must have a discriminator exactly if it had one before; restore it.'
            )
        # The schedule is that of the option file, which may have been extended; the state has the position in it.
        position = ('last_epoch', '_step_count', '_last_lr', 'base_lrs')
        schedulers = [{key: state[key] for key in position} for state in resume_state['schedulers']]
        super().resume_training({**resume_state, 'schedulers': schedulers})
        if rates:
            self.inner_rates.load_state(rates)
        self.num_update = self._resumed_at = resume_state['iter']
        self.prepare()
        call_hooks(self.hooks, 'after_load_checkpoint', self, checkpoint=resume_state)

    def finish(self, modules: Sequence[str] = ()) -> str:
        """End the run, in the first process: call the hooks' ``after_train``, write comparison pictures and report.

        Args:
            modules (Sequence[str]): Modules that ``--import`` loaded; the next command needs them, too.

        Returns:
            str: The results, to be printed at the end.
        """
        call_hooks(self.hooks, 'after_train', self)
        adapted = None
        if self.net_g_adapted is not None:
            adapted = self.adapter.in_words()
        outcome = Outcome(
            self.opt,
            self.net_g,
            self.validation_results,
            self.compared,
            self.num_update,
            self._resumed_at,
            adapted,
            time.monotonic() - self._began,
            self.fit_share,
        )
        return write_outcome(outcome, modules)
