"""Few-shot adaptation of a trained network to a new camera, without training it again."""

from __future__ import annotations

from typing import Any

from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY

from drtl_plugin.errors import OptionError
from drtl_plugin.models.drtl_model import DRTLModel


@MODEL_REGISTRY.register()
class DRTLAdaptModel(DRTLModel):
    """``DRTLModel`` without training steps: it measures the relation, adapts, validates and saves ``net_g_adapted``.

    Args:
        opt (dict): Options of ``DRTLModel``. ``train`` needs only the losses: a schedule without iterations, which
            BasicSR requires, is filled in (:func:`drtl_plugin.options.parse.parse_options`).

    Raises:
        OptionError: If ``path.pretrain_network_g`` or ``datasets.train.target`` is missing, or if step sizes are to be
            learned. (``path.pretrain_inner_rates`` names step sizes that training has learned.)
    """

    takes_steps = False

    def __init__(self, opt: dict[str, Any]) -> None:
        if opt['is_train'] and not opt['path'].get('pretrain_network_g'):
            raise OptionError('path.pretrain_network_g is missing: DRTLAdaptModel adapts a trained network.')
        if opt['is_train'] and not opt['datasets']['train'].get('target'):
            raise OptionError('datasets.train.target is missing; it names the pairs of the camera to adapt to.')
        super().__init__(opt)
        if self.is_train and self.inner_rates.logarithms:
            raise OptionError(
                'drtl.inner.rate_lr: DRTLAdaptModel learns no step sizes; path.pretrain_inner_rates can load some.'
            )

    def save(self, epoch: int, current_iter: int) -> None:
        """Measure the relation, adapt, and save the adapted network; ``net_g`` is neither changed nor saved."""
        self.start()
        self.save_hook_results(current_iter)
        get_root_logger().info(f'The adapted network is saved in {self.opt["path"]["models"]}.')
