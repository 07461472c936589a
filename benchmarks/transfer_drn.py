"""The DRN that predicts transfer: measure transfer between many tasks, train the DRN on it, and test it on cameras.

    python benchmarks/transfer_drn.py measure --scale 3 --seed 0     # a transfer matrix; minutes on a GPU
    python benchmarks/transfer_drn.py truth --track nikon_x3 --seed 0     # what helps a camera; minutes on a GPU
    python benchmarks/transfer_drn.py train        # writes drtl_plugin/relation/transfer_relation_net.pth
    python benchmarks/transfer_drn.py report       # rank correlations with what helps the cameras

A *transfer matrix* belongs to a scale and a seed: the default library's 17 tasks and 111 random compositions; a network
trained on all of them alike (EDSR 32 × 4; for seed 2, SRVGGNetCompact); copies of it that learn one task each in 60
Adam steps; and their losses on all tasks, on photographs that none of them learned from. The gain of task i on task j
is ``log L_j(θ) - log L_j(θ_i)``, centred over i.

The images are scikit-image's (see its ``data/README.txt``: public domain or CC0, and brick, grass and gravel from CC0
Textures) and matplotlib's portrait of Grace Hopper (public domain). Cameras are used to report only.
"""

from __future__ import annotations

# Before torch: common imports drtl_plugin, which repairs BasicSR.
from common import (
    HERE,
    LQ_SIZE,
    auxiliary_data,
    markdown_table,
    read_image,
    read_pairs,
)

import argparse  # isort: skip
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

from drtl_plugin.relation.estimators import learn_task
from drtl_plugin.runtime.progress import progress
from drtl_plugin.sources.sample import SCALE as SAMPLE_SCALE
from drtl_plugin.sources.sample import prepare_sample_data
from drtl_plugin.tasks.library import DistortionLibrary, default_library, random_composition
from drtl_plugin.tasks.patches import paired_patches

MATRICES = HERE / 'results/transfer'
TRUTH = HERE / 'transfer_truth'
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


def open_images() -> list[Tensor]:
    """Photographs that may be redistributed, uint8, ``(3, H, W)``."""
    with tempfile.TemporaryDirectory() as folder:
        files = sorted((prepare_sample_data(Path(folder, 'sample')) / 'auxiliary').iterdir())
        files.append(Path(matplotlib.get_data_path(), 'sample_data/grace_hopper.jpg'))
        return [(read_image(file)[0] * 255).round().byte() for file in files]


def camera_pairs(data: Path, track: str, part: str) -> list[tuple[Tensor, Tensor]]:
    """Pairs ``(lq, gt)`` of a camera, uint8, ``(3, …)`` each."""
    camera, scale = TRACKS[track]
    if camera != 'sample':
        return read_pairs(data / camera / part, scale)
    with tempfile.TemporaryDirectory() as folder:
        root = prepare_sample_data(Path(folder, 'sample')) / 'camera' / part
        return [
            tuple((read_image(root / side / file.name)[0] * 255).round().byte() for side in ('lq', 'gt'))
            for file in sorted((root / 'gt').iterdir())
        ]


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
            for patches in paired_patches(camera_pairs(data, track, 'support'), NUM_CAMERA, LQ_SIZE, generator)
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
    pairs = camera_pairs(data, track, 'val')
    psnr = {
        label: round(single_task_psnr(auxiliary, task, pairs, SINGLE_TASK_STEPS, seed), 4)
        for task, label in enumerate(progress(auxiliary.library.labels, track, len(auxiliary.library)))
    }
    TRUTH.mkdir(exist_ok=True)
    path.write_text(json.dumps(psnr, indent=1) + '\n', encoding='utf-8')


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
    args = arguments.parse_args()
    if args.command == 'measure':
        measure(args.data, args.scale, args.seed)
    else:
        truth(args.data, args.track, args.seed)


if __name__ == '__main__':
    main()
