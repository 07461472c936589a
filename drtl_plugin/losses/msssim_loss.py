"""MS-SSIM as a loss."""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

# Exponents of the scales, from fine to coarse (Wang et al., 2003), and the side of the Gaussian window.
_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = 11


@LOSS_REGISTRY.register()
class MSSSIMLoss(nn.Module):
    """``1 - MS-SSIM``, with the similarity s of each scale mapped to ``(1 + s) / 2`` to keep gradients finite.

    Small patches have fewer than five scales, whose exponents are normalised to sum 1.

    Args:
        loss_weight (float): Factor of the loss. Default: 1.0.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        # Imported here, since it takes a second.
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

        self.loss_weight = loss_weight
        self._similarity = multiscale_structural_similarity_index_measure

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of images ``(B, C, H, W)`` in [0, 1].

        Raises:
            ValueError: If an image has a side of fewer than 11 pixels.
        """
        exponents = _exponents(min(pred.shape[-2:]))
        with torch.autocast(pred.device.type, enabled=False):  # variances need float32
            similarity = self._similarity(
                pred.float(), target.float(), data_range=1.0, betas=exponents, normalize='simple', kernel_size=_WINDOW
            )
        return self.loss_weight * (1 - similarity)


def _exponents(side: int) -> tuple[float, ...]:
    """Exponents of as many scales as fit into an image of this side."""
    # torchmetrics asks for (number - 1)² windows, even if 2^(number - 1) is less.
    fits = [n for n in range(1, 6) if side // max(2 ** (n - 1), (n - 1) ** 2) >= _WINDOW]
    if not fits:
        raise ValueError(f'MSSSIMLoss needs patches of at least {_WINDOW} pixels a side, not {side}.')
    exponents = _EXPONENTS[: fits[-1]]
    return tuple(exponent / sum(exponents) for exponent in exponents)
