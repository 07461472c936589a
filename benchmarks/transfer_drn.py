"""The DRN that predicts transfer: measure transfer between many tasks, train the DRN on it, and test it on cameras.

    python benchmarks/transfer_drn.py measure --scale 3 --seed 0     # a transfer matrix; minutes on a GPU
    python benchmarks/transfer_drn.py truth --track nikon_x3 --seed 0     # what helps a camera; minutes on a GPU
    python benchmarks/transfer_drn.py train        # writes drtl_plugin/archs/TransferRelationNet.pth; 10 minutes
    python benchmarks/transfer_drn.py report       # rank correlations on held-out tasks and networks, and on cameras

A *transfer matrix* belongs to a scale and a seed: the default library's 17 tasks and 111 random compositions; a network
trained on all of them alike (EDSR 32 × 4; for seed 2, SRVGGNetCompact); copies of it that learn one task each in 60
Adam steps; and their losses on all tasks, on photographs that none of them learned from (except that the left image of
the stereo pair ``motorcycle`` is on one side and the right one on the other). The gain of task i on task j is
``log L_j(θ) - log L_j(θ_i)``, centred over i.

The images are in scikit-image's and matplotlib's wheels; ``benchmarks/README.md`` lists their licences. The report
holds out tasks and a network, but no photographs, which all matrices share.
"""

from __future__ import annotations

# Before torch: common imports drtl_plugin, which repairs BasicSR.
from common import (
    HERE,
    LQ_SIZE,
    auxiliary_data,
    camera_pairs,
    markdown_table,
    read_bytes,
)

import argparse  # isort: skip
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path

import matplotlib
import torch
from basicsr.archs import build_network
from camera_relation import single_task_psnr
from scipy.stats import spearmanr
from torch import Tensor, nn

from drtl_plugin.archs import TransferRelationNet
from drtl_plugin.archs.drn_arch import PairSpectrum
from drtl_plugin.models.relation_net import load_shipped
from drtl_plugin.relation.drn_training import TransferMatrix, disturb_gt, train_transfer
from drtl_plugin.relation.estimators import RelationEvidence, RelationQuestion, learn_task, predicted_transfer
from drtl_plugin.runtime.progress import progress
from drtl_plugin.sources.sample import SCALE as SAMPLE_SCALE
from drtl_plugin.sources.sample import prepare_sample_data
from drtl_plugin.tasks.distortions import bicubic
from drtl_plugin.tasks.library import DistortionLibrary, default_library
from drtl_plugin.tasks.patches import paired_patches
from drtl_plugin.tasks.random_camera import random_composition

MATRICES = HERE / 'transfer_matrices'
TRUTH = HERE / 'transfer_truth'
SHIPPED = HERE.parent / 'drtl_plugin/archs/TransferRelationNet.pth'
# Camera and scale.
TRACKS = {
    'nikon_x4': ('city100_nikon', 4),
    'nikon_x3': ('city100_nikon', 3),
    'iphone_x2': ('city100_iphone', 2),
    'sample_x4': ('sample', SAMPLE_SCALE),
}
NUM_TASKS, BASE_STEPS, STEPS, BATCH, LR = 128, 1000, 60, 16, 3e-4
NUM_JUDGED, NUM_CAMERA = 32, 64
SINGLE_TASK_STEPS = 600
NUM_CONTENTS, NUM_HELD_OUT, WINDOW = 64, 32, 8
TRAINING_STEPS, TRAINING_LR, PAIRS_A_STEP = 1500, 2e-3, 8


def open_images() -> list[Tensor]:
    """Photographs that may be redistributed, uint8, ``(3, H, W)``."""
    with tempfile.TemporaryDirectory() as folder:
        files = sorted((prepare_sample_data(Path(folder, 'sample')) / 'auxiliary').iterdir())
        files.append(Path(matplotlib.get_data_path(), 'sample_data/grace_hopper.jpg'))
        return [read_bytes(file) for file in files]


def gt_patches(images: list[Tensor], num: int, side: int, generator: torch.Generator) -> Tensor:
    """``(num, 3, side, side)`` in [0, 1]."""
    return paired_patches([(image, image) for image in images], num, side, generator)[1]


def train_on_all(library: DistortionLibrary, images: list[Tensor], network: dict, seed: int, device: str) -> nn.Module:
    """A network that knows all tasks alike."""
    torch.manual_seed(seed)
    net = build_network(network).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=BASE_STEPS)
    generator, synthesis = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    for _ in progress(range(BASE_STEPS), 'base network', BASE_STEPS):
        gt = gt_patches(images, BATCH, LQ_SIZE * library.scale, generator).to(device)
        chosen = torch.randint(len(library), (4,), generator=generator).tolist()
        lq = torch.cat([library.tasks[task](part, synthesis) for task, part in zip(chosen, gt.chunk(4), strict=True)])
        optimizer.zero_grad()
        nn.functional.l1_loss(net(lq), gt).backward()
        optimizer.step()
        scheduler.step()
    return net


@torch.no_grad()
def patch_losses(net: nn.Module, lq: Tensor, gt: Tensor) -> Tensor:
    """L1 of each patch, ``(B,)``."""
    parts = zip(lq.split(1024), gt.split(1024), strict=True)
    return torch.cat([(net(some_lq) - some_gt).abs().mean(dim=(1, 2, 3)) for some_lq, some_gt in parts])


def measure(data: Path, scale: int, seed: int) -> None:
    """Measure and save a transfer matrix, unless it is there."""
    path = MATRICES / f'x{scale}_{seed}.pth'
    if path.is_file():
        return
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    generator = torch.Generator().manual_seed(seed)
    synthesis = torch.Generator(device).manual_seed(seed)
    entries = default_library(scale)
    entries += [random_composition(scale, generator) for _ in range(NUM_TASKS - len(entries))]
    entries = [{**entry, 'label': str(i)} for i, entry in enumerate(entries)]
    library = DistortionLibrary(entries, scale)
    images = open_images()
    learned, judged = images[seed % 2 :: 2], images[1 - seed % 2 :: 2]
    network = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 32, 'num_block': 4, 'upscale': scale}
    if seed == 2:
        network = {'type': 'SRVGGNetCompact', 'num_feat': 32, 'num_conv': 8, 'upscale': scale}
    base = train_on_all(library, learned, network, seed, device)
    gt = gt_patches(learned, STEPS * BATCH, LQ_SIZE * scale, generator).to(device)
    judged_gt = gt_patches(judged, NUM_JUDGED, LQ_SIZE * scale, generator).to(device)
    judged_lq = torch.cat([task(judged_gt, synthesis) for task in library.tasks])
    judged_gt = judged_gt.repeat(len(library), 1, 1, 1)
    cameras = {
        track: [
            patches.to(device)
            for patches in paired_patches(
                list(camera_pairs(data, *TRACKS[track], 'support').values()), NUM_CAMERA, LQ_SIZE, generator
            )
        ]
        for track, (_, camera_scale) in TRACKS.items()
        if camera_scale == scale
    }
    losses: dict[str, list[Tensor]] = {name: [] for name in ('tasks', *cameras)}
    criterion = nn.L1Loss()
    for task in progress(library.tasks, f'transfer x{scale}', len(library)):
        net = learn_task(base, criterion, task(gt, synthesis), gt, STEPS, LR, BATCH).eval()
        losses['tasks'].append(patch_losses(net, judged_lq, judged_gt).unflatten(0, (-1, NUM_JUDGED)).mean(1))
        for track, (lq, camera_gt) in cameras.items():
            losses[track].append(patch_losses(net, lq, camera_gt).mean())
    MATRICES.mkdir(parents=True, exist_ok=True)
    gains = {name: -torch.stack(rows).log().cpu() for name, rows in losses.items()}
    gains = {name: rows - rows.mean(dim=0) for name, rows in gains.items()}
    torch.save({'scale': scale, 'seed': seed, 'entries': entries, 'gains': gains}, path)


def truth(data: Path, track: str, seed: int) -> None:
    """Measure what each of the default library's tasks alone gives on a camera's ``val``, unless it is there."""
    path = TRUTH / f'{track}_{seed}.json'
    if path.is_file():
        return
    auxiliary = auxiliary_data(data, TRACKS[track][1])
    pairs = list(camera_pairs(data, *TRACKS[track], 'val').values())
    psnr = {
        label: round(single_task_psnr(auxiliary, task, pairs, SINGLE_TASK_STEPS, seed), 4)
        for task, label in enumerate(progress(auxiliary.library.labels, track, len(auxiliary.library)))
    }
    TRUTH.mkdir(exist_ok=True)
    path.write_text(json.dumps(psnr, indent=1) + '\n', encoding='utf-8')


@torch.no_grad()
def features(library: DistortionLibrary, gt: Tensor, generator: torch.Generator, disturbed: bool = False) -> Tensor:
    """What a DRN sees of GT patches under each task, ``(N, P, num_out)``; their GT disturbed as that of real pairs."""
    spectrum = PairSpectrum(WINDOW)
    reference = bicubic(disturb_gt(gt, generator, library.scale) if disturbed else gt, library.scale)
    return torch.stack([spectrum(task(gt, generator), reference) for task in library.tasks])


def read_matrices() -> dict[tuple[int, int], list[TransferMatrix]]:
    """By scale and seed: the matrix with each half of the images as auxiliary ones, the other as the target's."""
    images = open_images()
    halves = images[0::2], images[1::2]
    result = {}
    for path in progress(sorted(MATRICES.glob('*.pth')), 'features', len(list(MATRICES.glob('*.pth')))):
        measured = torch.load(path, weights_only=True)
        scale, seed = measured['scale'], measured['seed']
        library = DistortionLibrary(measured['entries'], scale)
        generator = torch.Generator().manual_seed(seed)
        gt = [gt_patches(half, NUM_CONTENTS, LQ_SIZE * scale, generator) for half in halves]
        auxiliary = [features(library, patches, generator) for patches in gt]
        target = [features(library, patches, generator, disturbed=True) for patches in gt]
        gains = measured['gains']['tasks']
        result[scale, seed] = [TransferMatrix(gains, auxiliary[i], target[1 - i]) for i in range(2)]
    return result


def trained_on(matrices: list[TransferMatrix], num_member: int = 5) -> TransferRelationNet:
    """A DRN trained on some matrices."""
    torch.manual_seed(0)
    net = TransferRelationNet(WINDOW, num_member=num_member)
    for seed, member in enumerate(net.members):
        course = train_transfer(member, matrices, TRAINING_STEPS, TRAINING_LR, PAIRS_A_STEP, seed)
        for _ in progress(course, f'member {seed + 1}', TRAINING_STEPS):
            pass
    return net


@torch.no_grad()
def embeddings(net: TransferRelationNet, tasks: Tensor) -> Tensor:
    """Mean embedding of each task's features ``(N, P, num_out)``."""
    return torch.cat(
        [member.embed(tasks.flatten(0, 1)).unflatten(0, tasks.shape[:2]).mean(dim=1) for member in net.members], dim=1
    )


def rank_correlation(net: TransferRelationNet, matrix: TransferMatrix, targets: list[int]) -> float:
    """Mean Spearman correlation of predicted and measured gains of all tasks, over targets."""
    predicted = net.gains(embeddings(net, matrix.auxiliary), embeddings(net, matrix.target[targets]))
    return statistics.mean(
        float(spearmanr(predicted[:, i].detach(), matrix.gains[:, j])[0]) for i, j in enumerate(targets)
    )


def train(matrices: dict[tuple[int, int], list[TransferMatrix]]) -> None:
    """Train the DRN that is shipped."""
    net = trained_on([matrix for both in matrices.values() for matrix in both])
    torch.save({'params': net.half().state_dict()}, SHIPPED)


def held_out(matrices: dict[tuple[int, int], list[TransferMatrix]]) -> str:
    """Rank correlations on tasks that training has not seen, with a network that it has not seen, or both."""
    kept = list(range(NUM_TASKS - NUM_HELD_OUT))
    out = list(range(NUM_TASKS - NUM_HELD_OUT, NUM_TASKS))

    def without_tasks(matrix: TransferMatrix) -> TransferMatrix:
        return TransferMatrix(matrix.gains[kept][:, kept], matrix.auxiliary[kept], matrix.target[kept])

    net = trained_on([without_tasks(m) for some in matrices.values() for m in some], num_member=2)
    other = trained_on([m for (_, seed), some in matrices.items() if seed != 2 for m in some], num_member=2)
    rows = []
    for scale in (2, 3, 4):
        tasks = [rank_correlation(net, m, out) for seed in range(3) for m in matrices[scale, seed]]
        networks = [rank_correlation(other, m, list(range(NUM_TASKS))) for m in matrices[scale, 2]]
        rows.append([f'x{scale}', f'{statistics.mean(tasks):.2f}', f'{statistics.mean(networks):.2f}'])
    return markdown_table(['scale', 'new tasks', 'new tasks, another network'], rows)


@torch.no_grad()
def predicted(net: TransferRelationNet, data: Path, track: str, seed: int) -> Tensor:
    """Relation of each task of the default library to a camera, as the estimator computes it."""
    scale = TRACKS[track][1]
    generator = torch.Generator().manual_seed(seed)
    library = DistortionLibrary('default', scale)
    gt = gt_patches(open_images(), NUM_CAMERA, LQ_SIZE * scale, generator)
    evidence = RelationEvidence(
        torch.stack([task(gt, generator) for task in library.tasks]),
        gt,
        *paired_patches(list(camera_pairs(data, *TRACKS[track], 'support').values()), NUM_CAMERA, LQ_SIZE, generator),
    )
    question = RelationQuestion(library.labels, lambda: evidence, net, nn.Identity(), nn.L1Loss())
    return predicted_transfer(question).relation


def on_cameras(data: Path) -> str:
    """Rank correlations with the truth."""
    net = load_shipped('TransferRelationNet')
    rows = []
    for track, (_, scale) in TRACKS.items():
        files = [TRUTH / f'{track}_{seed}.json' for seed in range(3)]
        runs = [list(json.loads(file.read_text(encoding='utf-8')).values()) for file in files if file.is_file()]
        if not runs:
            rows.append([track, 'not run', '', '', ''])
            continue
        mean = [statistics.mean(values) for values in zip(*runs, strict=True)]
        ceilings = [float(spearmanr(a, b)[0]) for a, b in itertools.combinations(runs, 2)]
        relations = [float(spearmanr(predicted(net, data, track, seed), mean)[0]) for seed in range(3)]
        measured = [torch.load(MATRICES / f'x{scale}_{seed}.pth')['gains'][track][:17] for seed in range(3)]
        transfers = [float(spearmanr(gains, mean)[0]) for gains in measured]
        rows.append(
            [
                track,
                str(len(runs)),
                f'{statistics.mean(ceilings):.2f}' if ceilings else 'not run',
                f'{statistics.mean(relations):.2f} ({min(relations):.2f} to {max(relations):.2f})',
                f'{statistics.mean(transfers):.2f} ({min(transfers):.2f} to {max(transfers):.2f})',
            ]
        )
    return markdown_table(['camera', 'seeds of the truth', 'ceiling', 'predicted_transfer', 'measured, 60 steps'], rows)


def main() -> None:
    """Run a command."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--data', type=Path, default=os.environ.get('DRTL_REAL_DATA'), help='for cameras')
    commands = arguments.add_subparsers(dest='command', required=True)
    command = commands.add_parser('measure')
    command.add_argument('--scale', type=int, required=True)
    command.add_argument('--seed', type=int, required=True)
    command = commands.add_parser('truth')
    command.add_argument('--track', choices=TRACKS, required=True)
    command.add_argument('--seed', type=int, required=True)
    commands.add_parser('train')
    commands.add_parser('report')
    args = arguments.parse_args()
    if args.command == 'train':
        train(read_matrices())
    elif args.command == 'report':
        print(held_out(read_matrices()))
        print(on_cameras(args.data))
    elif args.command == 'measure':
        measure(args.data, args.scale, args.seed)
    else:
        truth(args.data, args.track, args.seed)


if __name__ == '__main__':
    main()
