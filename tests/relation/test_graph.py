import json
import math
import re

import cv2
import matplotlib
import pytest
import torch

from drtl_plugin.errors import DataError
from drtl_plugin.relation.graph import (
    KnowledgeGraph,
    effective_number,
    graph_from_embeddings,
    relation_weights,
    uniform_graph,
)


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
        # it is a softmax: log weights are affine in the relation
        slope = weights.log().diff() / relation.diff()
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


class TestGraph:
    def test_edges_are_cosines_about_the_librarys_mean(self):
        auxiliary = torch.tensor([[11.0, 5.0], [9.0, 5.0]])  # mean (10, 5): directions (1, 0) and (-1, 0)
        target = torch.tensor([13.0, 8.0])  # direction (3, 3)
        graph = graph_from_embeddings(['a', 'b'], auxiliary, target)
        half = math.sqrt(0.5)
        assert torch.allclose(graph.edges, torch.tensor([[1, -1, half], [-1, 1, -half], [half, -half, 1]]), atol=1e-6)
        assert graph.relation.tolist() == pytest.approx([half, -half])

    def test_a_common_offset_does_not_matter(self, generator):
        auxiliary, target = torch.randn(5, 8, generator=generator), torch.randn(8, generator=generator)
        graph = graph_from_embeddings(list('abcde'), auxiliary, target)
        moved = graph_from_embeddings(list('abcde'), auxiliary + 3, target + 3)
        assert torch.allclose(graph.edges, moved.edges, atol=1e-5)
        assert torch.equal(graph.edges, graph.edges.T)

    @pytest.mark.parametrize('number', [math.nan, math.inf])
    def test_relations_that_are_not_finite_are_refused_by_name(self, number):
        edges = torch.eye(4)
        edges[1, -1] = edges[-1, 1] = number
        with pytest.raises(DataError, match=r'drtl\.weighting\.relation: the relation measured for b is not finite'):
            KnowledgeGraph(('a', 'b', 'c'), edges)

    def test_only_the_bad_embedding_is_named(self, generator):
        embeddings = torch.randn(4, 8, generator=generator)
        embeddings[2, 5] = math.nan
        with pytest.raises(DataError, match='measured for c is not finite'):
            graph_from_embeddings(['a', 'b', 'c'], embeddings[:3], embeddings[3])
        with pytest.raises(DataError, match='measured for the target is not finite'):
            graph_from_embeddings(['a', 'b', 'c'], embeddings[[0, 1, 3]], embeddings[2])

    def test_uniform_graph_weights_all_tasks_alike(self):
        assert torch.equal(relation_weights(uniform_graph(list('abc')).relation, effective_tasks=2), torch.ones(3))

    def test_is_saved_and_drawn(self, tmp_path, generator):
        embeddings = torch.randn(4, 8, generator=generator)
        graph = graph_from_embeddings(['a', 'b', 'c', 'd'], embeddings, embeddings[2])
        weights = relation_weights(graph.relation, effective_tasks=2)
        graph.save(tmp_path / 'graph.json', weights)
        content = json.loads((tmp_path / 'graph.json').read_text())
        assert content['labels'] == ['a', 'b', 'c', 'd']
        assert torch.equal(torch.tensor(content['edges']), graph.edges)
        assert content['weights'] == pytest.approx(weights.tolist())
        assert content['relation'][2] == pytest.approx(1)
        graph.draw(tmp_path / 'graph.png', weights)
        assert cv2.imread(str(tmp_path / 'graph.png')).std() > 1  # a picture with something on it

    @pytest.mark.parametrize('fixed_share', [None, 0.75])
    def test_the_picture_is_explained(self, tmp_path, generator, fixed_share):
        """In words, which SVG keeps: also which task has its weight whatever its relation, and names as they are."""
        labels = ['a', r'$\nothing$', '_c', 'camera fit']
        graph = graph_from_embeddings(labels, torch.randn(4, 8, generator=generator), torch.ones(8))
        with matplotlib.rc_context({'svg.fonttype': 'none'}):
            graph.draw(tmp_path / 'graph.svg', torch.tensor([0.1, 0.2, 0.3, 3.4]), fixed_share)
        texts = re.findall(r'>([^<>]+)</(?:text|tspan)>', (tmp_path / 'graph.svg').read_text())
        assert {*labels, 'target', 'target camera', 'relation to the target', '×0.10'} <= set(texts)
        assert 'task: closer = more related, larger = more weight' in texts
        assert 'joins a task to its most related task' in texts
        assert ('×3.40, fixed share 75%' in texts) == (fixed_share is not None)
        assert ('task with a fixed share of the weight' in texts) == (fixed_share is not None)
