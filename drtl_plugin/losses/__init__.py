"""Losses, registered in BasicSR's LOSS_REGISTRY."""

from drtl_plugin.losses.frequency_loss import FFTLoss
from drtl_plugin.losses.msssim_loss import MSSSIMLoss
from drtl_plugin.losses.perceptual_loss import VGGPerceptualLoss

__all__ = ['FFTLoss', 'MSSSIMLoss', 'VGGPerceptualLoss']
