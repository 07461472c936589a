"""Augmentation of patches."""

import pytest
import torch
from torch import nn

from drtl_plugin.tasks.patches import mixed_up, with_channels_permuted


@pytest.fixture
def batch():
    """LQ that is exactly its GT reduced, which neither augmentation changes."""
    gt = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool2d(gt, 2), gt


@pytest.mark.parametrize('augmentation', [mixed_up, with_channels_permuted])
class TestBoth:
    def test_lq_and_gt_stay_together(self, batch, augmentation):
        lq, gt = augmentation(batch, 0.7, torch.Generator().manual_seed(1))
        assert torch.allclose(nn.functional.avg_pool2d(gt, 2), lq, atol=1e-6)
        assert lq.shape == batch[0].shape and gt.shape == batch[1].shape

    @pytest.mark.parametrize('probability', [0.0, 0.5, 1.0])
    def test_is_as_frequent_as_asked(self, batch, augmentation, probability):
        _, gt = augmentation(batch, probability, torch.Generator().manual_seed(1))
        changed = (gt != batch[1]).flatten(1).any(1).float().mean().item()
        # One of six permutations is the old order.
        expected = probability * (1 if augmentation is mixed_up else 5 / 6)
        assert changed == pytest.approx(expected, abs=0 if probability == 0 else 0.15)


def test_a_mixture_is_of_a_patch_and_the_one_before(batch):
    _, gt = mixed_up(batch, 1.0, torch.Generator().manual_seed(1))
    for i in range(4):
        a, b = batch[1][i], batch[1][i - 1]
        coefficient = ((gt[i] - b) * (a - b)).sum() / (a - b).square().sum()
        assert 0 <= coefficient <= 1
        assert torch.allclose(gt[i], coefficient * a + (1 - coefficient) * b, atol=1e-5)


def test_permuted_channels_are_those_of_the_patch(batch):
    _, gt = with_channels_permuted(batch, 1.0, torch.Generator().manual_seed(1))
    assert torch.equal(gt.sort(dim=1).values, batch[1].sort(dim=1).values)
    assert torch.equal(gt.sum(dim=(2, 3)).sort(dim=1).values, batch[1].sum(dim=(2, 3)).sort(dim=1).values)
