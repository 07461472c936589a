"""L1 loss between spectra."""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F


@LOSS_REGISTRY.register()
class FFTLoss(nn.Module):
    """Mean absolute difference of the real and imaginary parts of the Fourier transforms.

    The transform is orthonormal, so that the loss does not depend on the patch size.

    Args:
        loss_weight (float): Factor of the loss. Default: 1.0.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of images ``(B, C, H, W)``, of any value range."""
        spectrum, wanted = (
            torch.view_as_real(torch.fft.rfft2(image.float(), norm='ortho')) for image in (pred, target)
        )
        return self.loss_weight * F.l1_loss(spectrum, wanted)
