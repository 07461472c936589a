"""``basicsr relation``."""

from __future__ import annotations

import argparse
from pathlib import Path

import drtl_plugin
from drtl_plugin.commands.arguments import add_option_file, choose_device
from drtl_plugin.errors import OptionError

SUMMARY = 'show which synthetic distortions resemble your camera'
DESCRIPTION = (
    'Measure how the camera of datasets.train.target relates to the auxiliary tasks. Prints a table with bars, and '
    'writes the knowledge graph to results/, as a picture and as JSON. The relations transfer and gradient need '
    'path.pretrain_network_g; for embedding, the distortion relation network is trained first, unless '
    'path.pretrain_network_r names a trained one.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.set_defaults(launcher='none', auto_resume=False, debug=False)
    add_option_file(parser)


def run(args: argparse.Namespace) -> None:
    """Measure the relation, write the knowledge graph, print the table."""
    choose_device(args)
    drtl_plugin.register()
    from basicsr.models import build_model
    from basicsr.utils import mkdir_and_rename

    from drtl_plugin.commands.runs import check, read_options
    from drtl_plugin.compat.basicsr import without_gpu
    from drtl_plugin.report.figures import draw_graph
    from drtl_plugin.report.tables import relation_table, write_graph
    from drtl_plugin.runtime.lock import exclusive

    opt = read_options(args, is_train=True)
    folder = Path('results', f'{opt["name"]}_relation')
    datasets = check(opt, args.opt, folder)
    relation = _measurable_relation(opt)
    with exclusive('results', folder.name), without_gpu():
        mkdir_and_rename(str(folder))
        opt['path'].update(experiments_root=str(folder), models=str(folder))
        model = build_model(opt)
        model.train_set = datasets.get('train')
        model.start()
        write_graph(model.graph, folder / 'knowledge_graph.json', model.weights)
        draw_graph(model.graph, folder / 'knowledge_graph.png', model.weights, model.fit_share)
    print(f'Relation to the target ({relation}), and the resulting weight:')
    print(relation_table(model.graph, model.weights))
    print(f'The knowledge graph is in {folder}.')


def _measurable_relation(opt: dict) -> str:
    """``drtl.weighting.relation``.

    Raises:
        OptionError: If something needed to measure it is missing.
    """
    from basicsr.utils.registry import MODEL_REGISTRY

    from drtl_plugin.models import DRTLModel
    from drtl_plugin.options.sections import DRTLOptions
    from drtl_plugin.relation.estimators import needs_trained_network

    if not issubclass(MODEL_REGISTRY.get(opt['model_type']), DRTLModel):
        raise OptionError(f'model_type: the relation is measured by DRTLModel, not by {opt["model_type"]}.')
    if not opt['datasets']['train'].get('target'):
        raise OptionError('datasets.train.target is missing; it names the pairs of the camera.')
    relation = DRTLOptions.from_opt(opt).weighting.relation
    if relation == 'uniform':
        raise OptionError("drtl.weighting.relation: 'uniform' measures nothing; choose another.")
    if needs_trained_network(relation) and not opt['path'].get('pretrain_network_g'):
        raise OptionError(f'path.pretrain_network_g is missing: relation {relation!r} needs a trained network.')
    return relation
