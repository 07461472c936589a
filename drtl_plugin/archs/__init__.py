"""Architectures, registered in BasicSR's ARCH_REGISTRY."""

from drtl_plugin.archs.drn_arch import DistortionRelationNet, TransferRelationNet
from drtl_plugin.archs.spandrel_arch import SpandrelNetwork

__all__ = ['DistortionRelationNet', 'SpandrelNetwork', 'TransferRelationNet']
