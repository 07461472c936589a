"""Gradient weights from relations."""

import math

import pytest
import torch

from drtl_plugin.relation.weights import effective_number, relation_weights


@pytest.fixture
def relation(generator) -> torch.Tensor:
    return torch.rand(13, generator=generator) * 2 - 1


class TestWeights:
    def test_closed_form_at_a_given_temperature(self):
        # softmax([0, ln 3]) = [1/4, 3/4], times N = 2
        weights = relation_weights(torch.tensor([0.0, math.log(3)]), temperature=1.0)
        assert weights.tolist() == pytest.approx([0.5, 1.5])

    def test_floor_is_spread_evenly(self):
        weights = relation_weights(torch.tensor([0.0, math.log(3)]), temperature=1.0, floor=0.2)
        assert weights.tolist() == pytest.approx([0.8 * 0.5 + 0.2, 0.8 * 1.5 + 0.2])

    @pytest.mark.parametrize('effective_tasks', [1.5, 3, 6, 12])
    def test_temperature_is_solved_for_the_effective_number(self, relation, effective_tasks):
        weights = relation_weights(relation, effective_tasks=effective_tasks)
        assert effective_number(weights) == pytest.approx(effective_tasks, rel=1e-4)
        assert weights.mean().item() == pytest.approx(1)
        # it is a softmax: log weights are affine in the relation, and grow with it
        slope = weights.log().diff() / relation.diff()
        assert slope[0] > 0
        assert torch.allclose(slope, slope[:1].expand_as(slope), rtol=1e-3)

    def test_scale_and_offset_of_the_relation_do_not_matter(self, relation):
        weights = relation_weights(relation, effective_tasks=5)
        assert torch.allclose(relation_weights(100 * relation - 7, effective_tasks=5), weights, atol=1e-4)

    @pytest.mark.parametrize('effective_tasks', [13, 100])
    def test_all_tasks_effective_means_equal_weights(self, relation, effective_tasks):
        assert torch.equal(relation_weights(relation, effective_tasks=effective_tasks), torch.ones(13))

    def test_equal_relations_give_equal_weights(self):
        assert torch.equal(relation_weights(torch.full((5,), 0.3), effective_tasks=2), torch.ones(5))

    def test_effective_number_counts_equal_weights(self):
        assert effective_number(torch.tensor([1.0, 1, 1, 0])) == pytest.approx(3)
        assert effective_number(torch.tensor([0.0, 4])) == pytest.approx(1)
