"""The sum of the losses."""

import pytest
import torch
from basicsr.utils.registry import MODEL_REGISTRY
from torch import nn

from drtl_plugin.models import DRTLModel
from tests.models.helpers import feed, skip_start


def test_losses_are_those_of_srmodel(build, quick_opt):
    class FixedPerceptual(nn.Module):
        def forward(self, x, gt):
            return (x - gt).mean().abs(), (x * gt).mean()

    quick_opt['drtl'].update(pipeline='pretrain', hooks=[])
    quick_opt['train']['pixel_opt'] = {'type': 'CharbonnierLoss', 'loss_weight': 2.0, 'reduction': 'mean'}
    model = build(quick_opt)
    model.cri_perceptual = FixedPerceptual()
    output, gt = torch.rand(2, 1, 3, 8, 8)
    total, losses = model.losses.by_name(output, gt)
    assert set(losses) == {'l_pix', 'l_percep', 'l_style'}
    charbonnier = 2 * torch.sqrt((output - gt) ** 2 + 1e-12).mean()
    assert total.item() == pytest.approx((charbonnier + (output - gt).mean().abs() + (output * gt).mean()).item())


class OverridesCriterion(DRTLModel):
    """Trains on a loss that is the opposite of SRModel's."""

    def criterion(self, output, gt):
        return -super().criterion(output, gt)


class ReplacesPixelLoss(DRTLModel):
    """The same, by another pixel loss."""

    def init_training_settings(self):
        super().init_training_settings()
        pixel = self.cri_pix
        self.cri_pix = lambda output, gt: -pixel(output, gt)


@pytest.mark.parametrize('model_class', [OverridesCriterion, ReplacesPixelLoss])
@pytest.mark.parametrize('pipeline', ['pretrain', 'meta'])
def test_a_derived_model_trains_and_adapts_on_its_own_loss(build, quick_opt, monkeypatch, model_class, pipeline):
    quick_opt['drtl'].update(pipeline=pipeline, hooks=[])
    monkeypatch.setattr(MODEL_REGISTRY, '_obj_map', {**MODEL_REGISTRY._obj_map, 'OwnModel': model_class})
    gradients, logs = [], []
    for quick_opt['model_type'] in ('DRTLModel', 'OwnModel'):
        model = build(quick_opt)
        skip_start(model)
        feed(model, [0, 1])
        # The inner loop would move in opposite directions.
        standing_still = dict.fromkeys(model.inner_rates.rates(), 0.0)
        monkeypatch.setattr(model.inner_rates, 'rates', lambda rates=standing_still: rates)
        model.optimize_parameters(1)
        gradients.append(torch.cat([p.grad.flatten() for p in model.net_g.parameters()]))
        logs.append(sum(value.item() for name, value in model.losses_of_step.items() if name.startswith('l_')))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], -gradients[0])
    assert logs[1] == pytest.approx(-logs[0])
    output, gt = torch.rand(2, 1, 3, 8, 8)
    assert model.adapter.criterion(output, gt) < 0
