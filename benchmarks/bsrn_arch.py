"""BSRN, a published network that neither BasicSR nor spandrel knows: here it plays a user's own, for ``--import``.

Written from the paper ("Blueprint Separable Residual Network for Efficient Image Super-Resolution", CVPRW 2022, arXiv
2205.05996) and the shapes in its published weights.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F


class BlueprintConv(nn.Module):
    """Blueprint separable convolution: pointwise, then depthwise."""

    def __init__(self, num_in: int, num_out: int, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.pw = nn.Conv2d(num_in, num_out, 1, bias=False)
        self.dw = nn.Conv2d(num_out, num_out, 3, stride, padding, groups=num_out)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, num_in, H, W)`` to ``(B, num_out, H', W')``."""
        return self.dw(self.pw(x))


class SpatialAttention(nn.Module):
    """Enhanced spatial attention (ESA)."""

    def __init__(self, num_feat: int) -> None:
        super().__init__()
        width = num_feat // 4
        self.conv1 = nn.Conv2d(num_feat, width, 1)
        self.conv_f = nn.Conv2d(width, width, 1)
        self.conv_max = BlueprintConv(width, width)
        self.conv2 = BlueprintConv(width, width, stride=2, padding=0)
        self.conv3 = BlueprintConv(width, width)
        self.conv3_ = BlueprintConv(width, width)
        self.conv4 = nn.Conv2d(width, num_feat, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape; H and W are at least 15."""
        narrow = self.conv1(x)
        pooled = F.max_pool2d(self.conv2(narrow), kernel_size=7, stride=3)
        pooled = self.conv3_(F.gelu(self.conv3(F.gelu(self.conv_max(pooled)))))
        pooled = F.interpolate(pooled, x.shape[-2:], mode='bilinear', align_corners=False)
        return x * torch.sigmoid(self.conv4(pooled + self.conv_f(narrow)))


class ChannelAttention(nn.Module):
    """Contrast-aware channel attention (CCA)."""

    def __init__(self, num_feat: int) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(
            nn.Conv2d(num_feat, num_feat // 16, 1), nn.ReLU(), nn.Conv2d(num_feat // 16, num_feat, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        mean = x.mean(dim=(2, 3), keepdim=True)
        contrast = (x - mean).square().mean(dim=(2, 3), keepdim=True).sqrt()
        return x * self.conv_du(contrast + mean)


class DistillationBlock(nn.Module):
    """Efficient separable distillation block (ESDB)."""

    def __init__(self, num_feat: int) -> None:
        super().__init__()
        half = num_feat // 2
        self.c1_d, self.c2_d, self.c3_d = (nn.Conv2d(num_feat, half, 1) for _ in range(3))
        self.c1_r, self.c2_r, self.c3_r = (BlueprintConv(num_feat, num_feat) for _ in range(3))
        self.c4 = BlueprintConv(num_feat, half)
        self.c5 = nn.Conv2d(4 * half, num_feat, 1)
        self.esa = SpatialAttention(num_feat)
        self.cca = ChannelAttention(num_feat)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        parts, refined = [], x
        for distil, refine in ((self.c1_d, self.c1_r), (self.c2_d, self.c2_r), (self.c3_d, self.c3_r)):
            parts.append(F.gelu(distil(refined)))
            refined = F.gelu(refine(refined) + refined)
        parts.append(F.gelu(self.c4(refined)))
        return self.cca(self.esa(self.c5(torch.cat(parts, dim=1)))) + x


class PixelShuffleDirect(nn.Module):
    """One convolution and a pixel shuffle."""

    def __init__(self, num_feat: int, upscale: int) -> None:
        super().__init__()
        self.upsampleOneStep = nn.Sequential(
            nn.Conv2d(num_feat, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, 3, upscale * H, upscale * W)``."""
        return self.upsampleOneStep(x)


@ARCH_REGISTRY.register()
class BSRN(nn.Module):
    """Blueprint Separable Residual Network; RGB in [0, 1].

    Args:
        num_feat (int): Channels.
        num_block (int): Distillation blocks.
        upscale (int): Scale.
    """

    def __init__(self, num_feat: int = 64, num_block: int = 8, upscale: int = 4) -> None:
        super().__init__()
        self.fea_conv = BlueprintConv(4 * 3, num_feat)
        self.blocks = [f'B{i + 1}' for i in range(num_block)]
        for name in self.blocks:
            self.add_module(name, DistillationBlock(num_feat))
        self.c1 = nn.Conv2d(num_block * num_feat, num_feat, 1)
        self.c2 = BlueprintConv(num_feat, num_feat)
        self.upsampler = PixelShuffleDirect(num_feat, upscale)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, 3, upscale * H, upscale * W)``."""
        shallow = feat = self.fea_conv(x.repeat(1, 4, 1, 1))
        trunk = []
        for name in self.blocks:
            feat = getattr(self, name)(feat)
            trunk.append(feat)
        return self.upsampler(self.c2(F.gelu(self.c1(torch.cat(trunk, dim=1)))) + shallow)
