"""Shared by the benchmarks: real data, a base network, tables."""

from __future__ import annotations

# Before torch, to shorten the spinning of its threads, and before BasicSR.
import drtl_plugin  # noqa: F401  isort: skip
import argparse
import csv
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from basicsr.archs.edsr_arch import EDSR
from basicsr.utils import imfrombytes, img2tensor
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from drtl_plugin.archs import DistortionRelationNet
from drtl_plugin.data.distortion_task_dataset import DistortionTaskDataset
from drtl_plugin.hooks import RelationHook
from drtl_plugin.relation.drn_training import train_drn
from drtl_plugin.sources.sample import prepare_sample_data
from drtl_plugin.tasks.library import DistortionLibrary

HERE = Path(__file__).resolve().parent
# Side of LQ patches in all benchmarks.
LQ_SIZE = 24


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        '--data',
        type=Path,
        default=os.environ.get('DRTL_REAL_DATA'),
        help='folder with bsds500_train and city100_*; default: the environment variable DRTL_REAL_DATA',
    )
    return result


def parse(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; exits with one line if the data is missing."""
    args = arguments.parse_args()
    if args.data is None or not Path(args.data, 'bsds500_train').is_dir():
        arguments.error('no real data: set --data or the environment variable DRTL_REAL_DATA to its folder.')
    args.data = Path(args.data)
    return args


def read_image(path: Path) -> Tensor:
    """RGB in [0, 1], ``(1, 3, H, W)``."""
    return img2tensor(imfrombytes(path.read_bytes()))[None] / 255


def read_pairs(folder: Path, scale: int) -> list[tuple[Tensor, Tensor]]:
    """City100's pairs ``(lq, gt)`` of a folder, ``(3, …)`` each, uint8, as from FewShotPairDataset."""
    return list(pairs_by_name(folder / 'hr', folder / f'lr_x{scale}').values())


def read_bytes(path: Path) -> Tensor:
    """RGB, uint8, ``(3, H, W)``."""
    return (read_image(path)[0] * 255).round().byte()


def pairs_by_name(gt: Path, lq: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs ``(lq, gt)`` of two folders, ``(3, …)`` each, uint8."""
    return {path.stem: (read_bytes(lq / path.name), read_bytes(path)) for path in sorted(gt.iterdir())}


def camera_pairs(data: Path, camera: str, scale: int, part: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs ``(lq, gt)`` by name of a camera of City100, or of the camera ``sample``, uint8, ``(3, …)`` each."""
    if camera != 'sample':
        return pairs_by_name(data / camera / part / 'hr', data / camera / part / f'lr_x{scale}')
    with tempfile.TemporaryDirectory() as folder:
        root = prepare_sample_data(Path(folder, 'sample')) / 'camera' / part
        return pairs_by_name(root / 'gt', root / 'lq')


def auxiliary_data(data: Path, scale: int) -> DistortionTaskDataset:
    """BSDS500 as GT of the default library's tasks."""
    return DistortionTaskDataset(
        {
            'name': 'bsds500_train',
            'type': 'DistortionTaskDataset',
            'dataroot_gt': str(data / 'bsds500_train'),
            'gt_size': LQ_SIZE * scale,
            'scale': scale,
        }
    )


def auxiliary_pairs(
    auxiliary: DistortionTaskDataset, library: DistortionLibrary, num: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``num`` GT patches, ``(P, 3, H, W)``, and the same under each task, ``(N, P, 3, h, w)``."""
    gt = auxiliary.gt_patches(num, generator)
    return gt, torch.stack([task(gt, generator) for task in library.tasks])


def train_relation_net(data: DistortionTaskDataset, seed: int) -> tuple[DistortionRelationNet, Tensor]:
    """A DRN trained with the defaults of RelationHook, and its training images, ``(N, P, 3, h, w)``."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    hook = RelationHook()
    net = DistortionRelationNet()
    gt, lq = auxiliary_pairs(data, data.library, hook.drn_contents, generator)
    course = train_drn(net, gt, lq, hook.drn_steps, hook.drn_lr, hook.drn_patches, generator)
    for _ in tqdm(course, total=hook.drn_steps, desc='DRN', disable=None, leave=False):
        pass
    return net, lq


def train_network(
    scale: int, draw: Callable[[], tuple[Tensor, Tensor]], steps: int, description: str, lr: float = 1e-3, seed: int = 0
) -> nn.Module:
    """EDSR (32 features, 4 blocks), trained with L1 and Adam, cosine schedule, from weights that the seed determines.

    It is trained where ``draw`` puts its patches.
    """
    torch.manual_seed(seed)
    net = EDSR(3, 3, num_feat=32, num_block=4, upscale=scale, res_scale=1).to(draw()[0].device)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in tqdm(range(steps), desc=description, disable=None, leave=False):
        lq, gt = draw()
        optimizer.zero_grad()
        nn.functional.l1_loss(net(lq), gt).backward()
        optimizer.step()
        scheduler.step()
    return net


def train_base(auxiliary: DistortionTaskDataset, steps: int, batch_size: int = 16) -> nn.Module:
    """A network trained on all auxiliary tasks with equal weights."""
    generator = torch.Generator().manual_seed(0)
    tasks = auxiliary.library.tasks

    def draw() -> tuple[Tensor, Tensor]:
        gt = auxiliary.gt_patches(batch_size, generator)
        chosen = torch.randint(0, len(tasks), (batch_size,), generator=generator).tolist()
        return torch.cat([tasks[task](gt[i : i + 1], generator) for i, task in enumerate(chosen)]), gt

    return train_network(auxiliary.library.scale, draw, steps, 'base network')


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        '| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + ' |' for row in cells
    ]
    lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    return '\n'.join(lines)


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Write a CSV that is either complete or not there."""
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix('.unfinished')
    with open(unfinished, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


def interval(differences: list[float]) -> str:
    """Mean, and half of the 95 % interval by Student's t."""
    mean = statistics.mean(differences)
    half = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return f'{mean:+.3f} ± {half:.3f}'
