"""Architectures, registered in BasicSR's ARCH_REGISTRY."""

from drtl_plugin.archs.drn_arch import DistortionRelationNet

__all__ = ['DistortionRelationNet']
