"""The sum of the losses."""

import pytest
import torch
from torch import nn


def test_losses_are_those_of_srmodel(build, quick_opt):
    class FixedPerceptual(nn.Module):
        def forward(self, x, gt):
            return (x - gt).mean().abs(), (x * gt).mean()

    quick_opt['drtl'].update(pipeline='pretrain', hooks=[])
    quick_opt['train']['pixel_opt'] = {'type': 'CharbonnierLoss', 'loss_weight': 2.0, 'reduction': 'mean'}
    model = build(quick_opt)
    model.criterion.perceptual = FixedPerceptual()
    output, gt = torch.rand(2, 1, 3, 8, 8)
    total, losses = model.criterion.by_name(output, gt)
    assert set(losses) == {'l_pix', 'l_percep', 'l_style'}
    charbonnier = 2 * torch.sqrt((output - gt) ** 2 + 1e-12).mean()
    assert total.item() == pytest.approx((charbonnier + (output - gt).mean().abs() + (output * gt).mean()).item())
