"""Models, registered in BasicSR's MODEL_REGISTRY."""

from drtl_plugin.models.drtl_adapt_model import DRTLAdaptModel
from drtl_plugin.models.drtl_model import DRTLModel

__all__ = ['DRTLAdaptModel', 'DRTLModel']
