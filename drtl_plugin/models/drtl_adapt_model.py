"""Few-shot adaptation of a trained network to a new camera, without training it again."""

from __future__ import annotations

from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY

from drtl_plugin.errors import OptionError
from drtl_plugin.models.drtl_model import DRTLModel


@MODEL_REGISTRY.register()
class DRTLAdaptModel(DRTLModel):
    """``DRTLModel`` without training steps: relation, adaptation, validation, and ``net_g_adapted`` saved.

    Args:
        opt (dict): Options of ``DRTLModel``. Of ``train`` only the losses matter: the schedule that BasicSR asks for
            is filled in, of no iterations (:func:`drtl_plugin.options.parse.parse_options`).

    Raises:
        OptionError: If there is no ``path.pretrain_network_g`` or no ``datasets.train.target``, or if step sizes are to
            be learned. (Those that training has learned are read from ``path.pretrain_inner_rates``.)
    """

    def __init__(self, opt: dict) -> None:
        if opt['is_train'] and not opt['path'].get('pretrain_network_g'):
            raise OptionError('path.pretrain_network_g is missing: DRTLAdaptModel adapts a network that is trained.')
        if opt['is_train'] and not opt['datasets']['train'].get('target'):
            raise OptionError('datasets.train.target is missing: the pairs of the camera to adapt to.')
        super().__init__(opt)
        if self.learns_rates:
            raise OptionError(
                'drtl.inner.rate_lr: DRTLAdaptModel learns no step sizes; path.pretrain_inner_rates has them.'
            )

    @property
    def trains_by_gan(self) -> bool:
        """Its only steps are those of adaptation."""
        return True

    def save(self, epoch: int, current_iter: int) -> None:
        """Measure the relation, adapt, and save what came of it; ``net_g`` is where it was."""
        self.start()
        self.save_hook_results(current_iter)
        get_root_logger().info(f'The adapted network is saved in {self.opt["path"]["models"]}.')
