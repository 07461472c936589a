"""The knowledge graph."""

import math

import pytest
import torch

from drtl_plugin.errors import DataError
from drtl_plugin.relation.graph import KnowledgeGraph, graph_from_embeddings, uniform_graph
from drtl_plugin.relation.weights import relation_weights


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
        with pytest.raises(DataError, match='the relation measured for b is not finite'):
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
