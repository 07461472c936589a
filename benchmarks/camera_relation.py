"""Does the relation predict which distortions help a real camera?

For City100's cameras at their native scales: the relation of five support pairs to each task of the default library,
by each estimator; the PSNR-Y on the validation pairs of a network trained on that task alone (same initial weights,
BSDS500, no adaptation); and the rank correlation of the two over the tasks.

The single-task networks take most of the time. Results are kept in benchmarks/results and not computed again.

    python benchmarks/camera_relation.py               # 50 minutes on 2 CPU cores
"""

from __future__ import annotations

import json
import statistics

from common import (
    HERE,
    LQ_SIZE,
    auxiliary_data,
    auxiliary_pairs,
    markdown_table,
    parse,
    parser,
    read_pairs,
    train_base,
    train_network,
    train_relation_net,
)

import torch  # isort: skip
from basicsr.metrics import calculate_psnr
from basicsr.utils import tensor2img
from scipy.stats import spearmanr
from torch import nn

from drtl_plugin.data.distortion_task_dataset import DistortionTaskDataset
from drtl_plugin.hooks import RelationHook
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY, RelationEvidence, RelationQuestion
from drtl_plugin.relation.graph import KnowledgeGraph
from drtl_plugin.relation.weights import relation_weights
from drtl_plugin.report.figures import draw_graph
from drtl_plugin.tasks.patches import paired_patches

# Native scale of each camera.
CAMERAS = {'city100_nikon': 3, 'city100_iphone': 2}
RELATIONS = ('embedding', 'gradient', 'transfer')
BATCH_SIZE = 16


@torch.no_grad()
def camera_psnr(net: nn.Module, pairs: list, scale: int) -> float:
    """Mean PSNR-Y over pairs ``(lq, gt)``, uint8, without a border of ``scale`` pixels."""
    device = next(net.parameters()).device
    values = []
    for lq, gt in pairs:
        result, target = (tensor2img(image[None]) for image in (net(lq[None].to(device) / 255), gt / 255))
        values.append(calculate_psnr(result, target, crop_border=scale, test_y_channel=True))
    return statistics.mean(values)


def single_task_psnr(data: DistortionTaskDataset, task: int, pairs: list, steps: int, seed: int = 0) -> float:
    """PSNR on a camera's pairs of a network trained on one task."""
    scale = data.library.scale
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    generator = torch.Generator().manual_seed(seed)
    synthesis = torch.Generator(device).manual_seed(seed)

    def draw():
        gt = data.gt_patches(BATCH_SIZE, generator).to(device)
        return data.library.tasks[task](gt, synthesis), gt

    return camera_psnr(train_network(scale, draw, steps, data.library.labels[task], seed=seed), pairs, scale)


def measure_relations(data: DistortionTaskDataset, support: list, base: nn.Module, seed: int) -> dict:
    """Knowledge graph of each estimator, with the defaults of RelationHook."""
    hook, generator = RelationHook(), torch.Generator().manual_seed(seed)
    net_r, _ = train_relation_net(data, seed)
    gt, lq = auxiliary_pairs(data, data.library, hook.num_patches, generator)
    evidence = RelationEvidence(lq, gt, *paired_patches(support, hook.num_patches, LQ_SIZE, generator))
    question = RelationQuestion(
        data.library.labels, lambda: evidence, net_r, base, nn.L1Loss(), hook.transfer_steps, hook.transfer_lr
    )
    return {relation: ESTIMATOR_REGISTRY.get(relation)(question) for relation in RELATIONS}


def mean_graph(graphs: list[KnowledgeGraph]) -> KnowledgeGraph:
    return KnowledgeGraph(graphs[0].labels, torch.stack([graph.edges for graph in graphs]).mean(dim=0))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument('--steps', type=int, default=600, help='training steps of each single-task network')
    arguments.add_argument('--base_steps', type=int, default=1000, help='those of the network of gradient and transfer')
    arguments.add_argument('--seeds', type=int, default=3, help='DRNs and draws of evidence')
    arguments.add_argument('--cameras', nargs='+', choices=CAMERAS, default=CAMERAS, help='these only')
    args = parse(arguments)
    for camera in args.cameras:
        scale = CAMERAS[camera]
        path = HERE / 'results' / f'{camera}_x{scale}_{args.steps}.json'
        path.parent.mkdir(exist_ok=True)
        result = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
        data = auxiliary_data(args.data, scale)
        labels = data.library.labels
        support, val = (read_pairs(args.data / camera / part, scale) for part in ('support', 'val'))
        for task, label in enumerate(labels):
            if label not in result.setdefault('psnr', {}):
                result['psnr'][label] = single_task_psnr(data, task, val, args.steps)
                path.write_text(json.dumps(result, indent=1), encoding='utf-8')
                print(f'{camera} x{scale}: {label} alone {result["psnr"][label]:.3f} dB', flush=True)
        psnr = [result['psnr'][label] for label in labels]
        base = train_base(data, args.base_steps)
        runs = [measure_relations(data, support, base, seed) for seed in range(args.seeds)]
        result['relation'], result['spearman'] = {}, {}
        for relation in RELATIONS:
            graph = mean_graph([run[relation] for run in runs])
            weights = relation_weights(graph.relation, floor=0.2)
            draw_graph(graph, path.parent / f'{camera}_x{scale}_{relation}.png', weights)
            result['relation'][relation] = dict(zip(labels, graph.relation.tolist(), strict=True))
            result['spearman'][relation] = [float(spearmanr(run[relation].relation, psnr)[0]) for run in runs]
        path.write_text(json.dumps(result, indent=1), encoding='utf-8')
        order = sorted(range(len(labels)), key=lambda i: -psnr[i])
        rows = [
            [labels[i], f'{psnr[i]:.2f}', *(f'{result["relation"][r][labels[i]]:+.2f}' for r in RELATIONS)]
            for i in order
        ]
        correlations = result['spearman'].values()
        rows.append(['rank correlation', '', *(f'{statistics.mean(values):.2f}' for values in correlations)])
        print(f'\n{camera} x{scale}\n')
        print(markdown_table(['task', 'alone, dB', *RELATIONS], rows), flush=True)


if __name__ == '__main__':
    main()
