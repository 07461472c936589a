"""Relation recovery under content shift: is each distortion its own nearest neighbour?

The auxiliary tasks use BSDS500. A support set is K photographs from another source (City100's GT: printed posters and
postcards) under one task, with parameters drawn once per photograph. In each trial, the task with the highest relation
to a support set should be the one that made it. A classifier of LQ patches serves as a baseline.

The second measurement is the blur order: the Spearman correlation, over pairs of blurs, between the distance of their
nodes and the difference of their sigmas.

    python benchmarks/relation_recovery.py             # 25 minutes on 2 CPU cores
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence

from common import (
    HERE,
    LQ_SIZE,
    auxiliary_data,
    auxiliary_pairs,
    markdown_table,
    parse,
    parser,
    read_image,
    train_base,
    train_relation_net,
)

import torch  # isort: skip
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from drtl_plugin.hooks import RelationHook
from drtl_plugin.models.relation_net import load_shipped
from drtl_plugin.relation.estimators import learn_task, mean_embedding, mean_gradient
from drtl_plugin.tasks.library import DistortionLibrary
from drtl_plugin.tasks.patches import paired_patches

SHOTS = (1, 2, 5)
LQ_ONLY = 'LQ-only classifier'
RELATIONS = ('embedding', LQ_ONLY, 'gradient', 'transfer', 'predicted_transfer')
# Blur sigmas in LQ pixels.
BLURS = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75)
# Side of support images in LQ pixels, large enough for patches to differ.
LQ_SIDE = 144
NUM_PATCHES = 64

Pairs = list[tuple[Tensor, Tensor]]
# Maps patches (lq, gt) to a node: a vector whose cosines are compared.
Node = Callable[[Tensor, Tensor], Tensor]


class LQClassifier(nn.Module):
    """Baseline: a small CNN that recognises the task of an LQ patch, without GT."""

    def __init__(self, num_task: int, num_feat: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for num_in, num_out, stride in ((3, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 1)):
            num_in = 3 if num_in == 3 else num_in * num_feat
            layers += [nn.Conv2d(num_in, num_out * num_feat, 3, stride, 1), nn.LeakyReLU(0.1)]
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(2 * num_feat, num_task)

    def forward(self, lq: Tensor) -> Tensor:
        return self.encoder(lq - 0.5)


def train_classifier(lq: Tensor, generator: torch.Generator) -> LQClassifier:
    """Train the classifier on the data of the DRN, with as many steps."""
    hook = RelationHook()
    steps, batch_size = hook.drn_steps, hook.drn_patches
    num_task, num_content = lq.shape[:2]
    net = LQClassifier(num_task)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    task = torch.arange(num_task).repeat_interleave(batch_size)
    for _ in tqdm(range(steps), desc='LQ classifier', disable=None, leave=False):
        chosen = torch.randint(0, num_content, (batch_size,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net.head(net(lq[:, chosen].flatten(0, 1))), task).backward()
        optimizer.step()
    return net.eval()


def support_images(data, scale: int) -> list[Tensor]:
    """Centre crops of City100's GT, ``(1, 3, H, W)`` each."""
    side = LQ_SIDE * scale
    images = []
    for path in sorted(data.glob('city100_*/support/hr/*')):
        image = read_image(path)
        top, left = ((extent - side) // 2 for extent in image.shape[-2:])
        images.append(image[..., top : top + side, left : left + side])
    return images


def degrade(images: Sequence[Tensor], library: DistortionLibrary, generator: torch.Generator) -> list[Pairs]:
    """For each task, its pairs of the images, rounded to 8 bits."""
    result = []
    for task in tqdm(library.tasks, desc='supports', disable=None, leave=False):
        pairs = [(task(image, generator)[0], image[0]) for image in images]
        result.append([tuple((image * 255).round().byte() for image in pair) for pair in pairs])
    return result


def cosines(auxiliary: Tensor, target: Tensor) -> Tensor:
    """Cosines between a target's node and the tasks' nodes, centred over the library."""
    centre = auxiliary.mean(dim=0)
    return F.normalize(auxiliary - centre, dim=1) @ F.normalize(target - centre, dim=0)


def trials(supports: list[Pairs], shots: int, relate: Callable[[Tensor, Tensor], Tensor], rounds: int) -> float:
    """Share of trials in which the task of a support set has the highest relation to it."""
    generator = torch.Generator().manual_seed(1)
    hits = []
    for _ in range(rounds):
        chosen = torch.randperm(len(supports[0]), generator=generator)[:shots].tolist()
        for task, pairs in enumerate(supports):
            patches = paired_patches([pairs[i] for i in chosen], NUM_PATCHES, LQ_SIZE, generator)
            hits.append(float(relate(*patches).argmax() == task))
    return statistics.mean(hits)


def blur_order(blurred: list[Pairs], node: Node, shots: int = 5, rounds: int = 5) -> float:
    """Mean Spearman correlation between distances of nodes and differences of sigma, on different contents."""
    generator = torch.Generator().manual_seed(2)
    sigmas = torch.tensor(BLURS)
    correlations = []
    for _ in range(rounds):
        sides = []
        for _ in range(2):
            chosen = torch.randperm(len(blurred[0]), generator=generator)[:shots].tolist()
            patches = [paired_patches([p[i] for i in chosen], NUM_PATCHES, LQ_SIZE, generator) for p in blurred]
            sides.append(torch.stack([node(*pair) for pair in patches]))
        distances = torch.cdist(*sides)
        correlations.append(spearmanr(distances.flatten(), (sigmas[:, None] - sigmas).abs().flatten())[0])
    return statistics.mean(correlations)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument('--scale', type=int, default=4)
    arguments.add_argument('--seeds', type=int, default=3, help='trainings of the DRN and of the classifier')
    arguments.add_argument('--rounds', type=int, default=20, help='supports of each task, for each number of shots')
    arguments.add_argument('--base_steps', type=int, default=1000, help='training of the network of gradient, transfer')
    arguments.add_argument('--relations', nargs='+', choices=RELATIONS, default=RELATIONS, help='measure these only')
    args = parse(arguments)
    generator = torch.Generator().manual_seed(0)
    auxiliary = auxiliary_data(args.data, args.scale)
    library = auxiliary.library
    images = support_images(args.data, args.scale)
    supports = degrade(images, library, generator)
    blurs = [{'name': 'gaussian_blur', 'sigma': s * args.scale, 'kernel_size': 4 * args.scale + 5} for s in BLURS]
    blurred = degrade(images, DistortionLibrary(blurs, args.scale), generator)
    gt, lq = auxiliary_pairs(auxiliary, library, NUM_PATCHES, generator)
    path = HERE / 'results' / f'relation_recovery_x{args.scale}.json'
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    results.update({name: [] for name in args.relations})

    def measure(name: str, relate: Callable[[Tensor, Tensor], Tensor], node: Node, rounds: int) -> None:
        row = [trials(supports, shots, relate, rounds) for shots in SHOTS] + [blur_order(blurred, node)]
        results[name].append(row)
        path.write_text(json.dumps(results, indent=1), encoding='utf-8')
        print(name, ' '.join(f'{value:.3f}' for value in row), flush=True)

    def measure_cosines(name: str, node: Node, rounds: int) -> None:
        nodes = torch.stack([node(task_lq, gt) for task_lq in lq])
        measure(name, lambda *patches: cosines(nodes, node(*patches)), node, rounds)

    for seed in range(args.seeds if {'embedding', LQ_ONLY} & set(args.relations) else 0):
        net_r, pool_lq = train_relation_net(auxiliary, seed)
        if 'embedding' in args.relations:
            measure_cosines('embedding', lambda lq, gt, net=net_r: mean_embedding(net, lq, gt), args.rounds)
        if LQ_ONLY in args.relations:
            net = train_classifier(pool_lq, torch.Generator().manual_seed(seed))
            with torch.no_grad():
                measure_cosines(LQ_ONLY, lambda lq, gt, net=net: net(lq).mean(dim=0), args.rounds)

    if 'predicted_transfer' in args.relations:
        shipped = load_shipped('TransferRelationNet')
        with torch.no_grad():
            nodes = torch.stack([mean_embedding(shipped, task_lq, gt) for task_lq in lq])

            def predicted(lq: Tensor, gt: Tensor) -> Tensor:
                return shipped.gains(nodes, mean_embedding(shipped, lq, gt)[None])[:, 0]

            measure('predicted_transfer', predicted, predicted, args.rounds)

    criterion = nn.L1Loss()
    slow = max(1, args.rounds // 4)  # each of their trials takes seconds
    if {'gradient', 'transfer'} & set(args.relations):
        base = train_base(auxiliary, args.base_steps)
    if 'gradient' in args.relations:
        measure_cosines('gradient', lambda lq, gt: mean_gradient(base, criterion, lq, gt), slow)
    if 'transfer' in args.relations:
        half, hook = NUM_PATCHES // 2, RelationHook()
        learned = [
            learn_task(base, criterion, task_lq[:half], gt[:half], hook.transfer_steps, hook.transfer_lr)
            for task_lq in lq
        ]

        @torch.no_grad()
        def gains(lq: Tensor, gt: Tensor) -> Tensor:
            losses = torch.stack([criterion(net(lq), gt) for net in learned]).log()
            return losses.mean() - losses

        measure('transfer', gains, gains, slow)
    rows = []
    for name, runs in results.items():
        columns = list(zip(*runs, strict=True))
        spread = [f' ± {statistics.stdev(column):.2f}' if len(column) > 1 else '' for column in columns]
        rows.append([name] + [f'{statistics.mean(column):.2f}{s}' for column, s in zip(columns, spread, strict=True)])
    print(markdown_table(['relation', *(f'K = {k}' for k in SHOTS), 'blur order'], rows))


if __name__ == '__main__':
    main()
