"""Pictures of the knowledge graph and the camera fit, and the graph as JSON."""

import json
import re

import cv2
import matplotlib
import pytest
import torch

from drtl_plugin.relation.graph import graph_from_embeddings
from drtl_plugin.relation.weights import relation_weights
from drtl_plugin.report.pictures import draw_camera_fit, draw_graph
from drtl_plugin.report.tables import write_graph
from drtl_plugin.tasks.camera_fit import CameraFit


def test_the_graph_is_written_and_drawn(tmp_path, generator):
    embeddings = torch.randn(4, 8, generator=generator)
    graph = graph_from_embeddings(['a', 'b', 'c', 'd'], embeddings, embeddings[2])
    weights = relation_weights(graph.relation, effective_tasks=2)
    write_graph(graph, tmp_path / 'graph.json', weights)
    content = json.loads((tmp_path / 'graph.json').read_text())
    assert content['labels'] == ['a', 'b', 'c', 'd']
    assert torch.equal(torch.tensor(content['edges']), graph.edges)
    assert content['weights'] == pytest.approx(weights.tolist())
    assert content['relation'][2] == pytest.approx(1)
    draw_graph(graph, tmp_path / 'graph.png', weights)
    assert cv2.imread(str(tmp_path / 'graph.png')).std() > 1  # a picture with something on it


@pytest.mark.parametrize('fixed_share', [None, 0.75])
def test_the_picture_is_explained(tmp_path, generator, fixed_share):
    """In words, which SVG keeps: also which task has its weight whatever its relation, and names as they are."""
    labels = ['a', r'$\nothing$', '_c', 'camera fit']
    graph = graph_from_embeddings(labels, torch.randn(4, 8, generator=generator), torch.ones(8))
    with matplotlib.rc_context({'svg.fonttype': 'none'}):
        draw_graph(graph, tmp_path / 'graph.svg', torch.tensor([0.1, 0.2, 0.3, 3.4]), fixed_share)
    texts = re.findall(r'>([^<>]+)</(?:text|tspan)>', (tmp_path / 'graph.svg').read_text())
    assert {*labels, 'target', 'target camera', 'relation to the target', '×0.10'} <= set(texts)
    assert 'task: closer = more related, larger = more weight' in texts
    assert 'joins a task to its most related task' in texts
    assert ('×3.40, fixed share 75%' in texts) == (fixed_share is not None)
    assert ('task with a fixed share of the weight' in texts) == (fixed_share is not None)


def test_the_camera_fit_is_drawn(tmp_path):
    kernel, tone = torch.full((3, 8, 8), 1 / 64), torch.tensor([[0.0, 1, 0, 0]] * 3)
    noise = {'noise': torch.zeros(3, 3), 'colour_correlation': torch.eye(3), 'neighbour_correlation': 0.0}
    fit = CameraFit(4, kernel, tone, torch.zeros(5, 2), **noise, gt_sigma=0.3, explained=0.5, explained_left_out=0.4)
    with matplotlib.rc_context({'svg.fonttype': 'none'}):
        draw_camera_fit(fit, tmp_path / 'fit.svg')
    texts = re.findall(r'>([^<>]+)</(?:text|tspan)>', (tmp_path / 'fit.svg').read_text())
    assert {f'{colour}: sigma 2.26 px' for colour in ('red', 'green', 'blue')} <= set(texts)
    assert any('GT softness 0.30 px' in text for text in texts)
