"""The relation, measured around training."""

import pytest
import torch
from basicsr.utils import get_root_logger

from drtl_plugin import cli
from drtl_plugin.hooks.relation_hook import set_graph
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY
from drtl_plugin.relation.graph import KnowledgeGraph
from tests.models.helpers import feed, parameters


class TestRelation:
    def test_hook_trains_the_drn_once_and_sets_weights(self, build, quick_opt, workdir):
        model = build(quick_opt)
        before = parameters(model.net_r).clone()
        feed(model, [0, 1])
        trained = parameters(model.net_r).clone()
        assert not torch.equal(before, trained)
        assert list(model.graph.labels) == model.library.labels
        assert model.weights.mean().item() == pytest.approx(1)
        assert model.weights.argmax() == model.graph.relation.argmax()
        kept = torch.load(workdir / 'experiments/drtl_x4/models/net_r_0.pth', weights_only=True)['params']
        assert torch.equal(kept['memory_bank.slots'], model.net_r.memory_bank.slots)
        feed(model, [0, 1])
        assert torch.equal(parameters(model.net_r), trained)

    def test_drn_given_by_path_is_not_trained(self, build, quick_opt, workdir):
        first = build(quick_opt)
        feed(first, [0, 1])
        quick_opt['path']['pretrain_network_r'] = str(workdir / 'experiments/drtl_x4/models/net_r_0.pth')
        second = build(quick_opt)
        feed(second, [0, 1])
        assert torch.equal(parameters(first.net_r), parameters(second.net_r))

    def test_graph_is_refreshed_every_interval(self, build, quick_opt):
        model = build(quick_opt)
        graphs = []
        for step in range(1, 5):
            feed(model, [0, 1])
            model.optimize_parameters(step)
            graphs.append(model.graph)
        assert graphs[1] is not graphs[0]  # interval 2: measured after the second step
        assert graphs[2] is graphs[1]
        assert graphs[3] is not graphs[2]

    def test_without_a_target_all_tasks_weigh_alike(self, build, quick_opt):
        del quick_opt['datasets']['train']['target']
        model = build(quick_opt)
        feed(model, [0, 1])
        model.optimize_parameters(1)
        assert model.graph is None
        assert torch.equal(model.weights, torch.ones(4))

    def test_a_measurement_that_is_not_finite_leaves_the_weights_in_training(self, build, quick_opt, monkeypatch):
        warnings = []
        monkeypatch.setattr(get_root_logger(), 'warning', warnings.append)
        quick_opt['drtl']['weighting']['mode'] = 'sampling'
        model = build(quick_opt)
        feed(model, [0, 1])
        graph, weights = model.graph, model.weights
        distort = type(model.library.tasks[2]).__call__

        def spoilt(task, gt, generator):
            return distort(task, gt, generator) * (float('nan') if task is model.library.tasks[2] else 1)

        with monkeypatch.context() as patch:
            patch.setattr(type(model.library.tasks[2]), '__call__', spoilt)
            for step in (1, 2):
                model.optimize_parameters(step)
        assert model.graph is graph and model.weights is weights
        (line,) = warnings
        name = model.library.labels[2]
        assert line.startswith(f'iteration 2: drtl.weighting.relation: the relation measured for {name} is not finite')
        for step in (3, 4):
            feed(model, [0, 1])
            model.optimize_parameters(step)
        assert model.graph is not graph
        assert len(warnings) == 1

    def test_a_measurement_that_is_not_finite_is_refused_before_training(self, workdir, quick_opt, write_opt, capsys):
        @ESTIMATOR_REGISTRY.register()
        def broken(question):
            edges = torch.eye(5)
            edges[-1, 1] = edges[1, -1] = float('nan')
            return KnowledgeGraph(tuple(question.labels), edges)

        quick_opt['drtl']['weighting'].update(relation='broken', mode='sampling')
        try:
            assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
        finally:
            del ESTIMATOR_REGISTRY._obj_map['broken']
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith('basicsr: error: drtl.weighting.relation: the relation measured for gaussian_blur')

    def test_graph_sets_weights_by_the_options(self, build, quick_opt):
        quick_opt['drtl']['weighting'].update(temperature=1.0, floor=0.0)
        model = build(quick_opt)
        edges = torch.eye(5)
        edges[-1, :-1] = edges[:-1, -1] = torch.tensor([0.0, 0.0, 0.0, 1.0])
        model.prepare()
        set_graph(model, KnowledgeGraph(tuple('abcd'), edges))
        assert torch.allclose(model.weights, 4 * torch.softmax(edges[-1, :-1], dim=0))


@pytest.mark.parametrize('relation', ['gradient', 'transfer'])
def test_relations_that_ask_the_network_wait_until_it_has_learned(build, quick_opt, relation):
    quick_opt['drtl']['weighting']['relation'] = relation
    model = build(quick_opt)
    for step in (1, 2):
        feed(model, [0, 1])
        assert model.graph is None
        model.optimize_parameters(step)
    assert model.graph is not None  # measured after the interval of 2
    assert model.net_r is None
