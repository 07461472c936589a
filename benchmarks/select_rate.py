"""How many folds should choose the learning rate of ``basicsr adapt``?

    python benchmarks/select_rate.py               # cells that are missing; 7 to 12 minutes each on a CPU core
    python benchmarks/select_rate.py --report      # the table

EDSR (32 features, 4 blocks), trained on bicubic downsampling, is adapted by the recipe of ``basicsr adapt`` to five
crops of 64² LQ pixels of City100's support pairs; 1, 2 or all folds choose the rate. Networks are
judged on the whole support images, of which a crop is a few per cent: the mean squared error over all images, in dB
below that before adaptation. ``val`` is not used.

A cell (camera, draw) is one CSV in ``benchmarks/select_rate``.
"""

from __future__ import annotations

# Before BasicSR: common imports drtl_plugin, which repairs BasicSR.
from common import HERE, auxiliary_data, interval, markdown_table, parse, parser, train_network, write_rows
from published import CASES, support, tensors

import argparse  # isort: skip
import csv
import itertools
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import torch
import yaml
from basicsr.models import build_model
from torch import Tensor, nn

from drtl_plugin.api.adapt_model import adaptation_options
from drtl_plugin.meta.adaptation import last
from drtl_plugin.models.adapter import Adapter
from drtl_plugin.options.parse import parse_options
from drtl_plugin.runtime.trained_network import load_trained
from drtl_plugin.tasks.distortions import bicubic

RESULTS = HERE / 'select_rate'
CELLS = list(itertools.product(('iphone_x2', 'nikon_x3'), (0, 1, 2)))
JUDGES = (1, 2, 5)
PRE_TRAINING = 1000
COLUMNS = ('judges', 'lr', 'share', 'gain')


@dataclass(eq=False)
class CachingAdapter(Adapter):
    """An adapter that runs each course once, however many choices it takes part in."""

    ends: dict[tuple[int, float], nn.Module] = field(default_factory=dict)

    def course(self, net, weights, pairs, steps, lr=None, fold=0) -> Iterator[nn.Module]:
        """The end of a course."""
        key = fold, self.options.rates[0] if lr is None else lr
        if key not in self.ends:
            self.ends[key] = last(super().course(net, weights, pairs, steps, lr, fold))
        yield self.ends[key]


def pre_trained(data: Path, scale: int) -> Path:
    """The file of the network before adaptation."""
    path = HERE / 'results' / f'select_rate_x{scale}.pth'
    if not path.is_file():
        auxiliary, generator = auxiliary_data(data, scale), torch.Generator().manual_seed(0)

        def draw() -> tuple[Tensor, Tensor]:
            gt = auxiliary.gt_patches(16, generator)
            return bicubic(gt, scale).clamp(0, 1), gt

        path.parent.mkdir(exist_ok=True)
        torch.save({'params': train_network(scale, draw, PRE_TRAINING, 'bicubic').state_dict()}, path)
    return path


def measure(data: Path, camera: str, draw: int) -> list[dict]:
    """Adapt to crops with all rates and folds, and let some of the folds choose."""
    scale = CASES[camera].scale
    crops, whole = support(data, CASES[camera], 'crops_5', draw), support(data, CASES[camera], 'pairs_5', draw)
    network = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 32, 'num_block': 4}
    weights = str(pre_trained(data, scale))
    with tempfile.TemporaryDirectory() as folder:
        for name, (gt, lq) in crops.items():
            for side, image in (('gt', gt), ('lq', lq)):
                Path(folder, 'pairs', side).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(Path(folder, 'pairs', side, f'{name}.png')), image)
        option_file = Path(folder, 'network.yml')
        option_file.write_text(str({'network_g': {**network, 'upscale': scale, 'res_scale': 1}, 'scale': scale}))
        trained = load_trained(weights, str(option_file))
        losses = {'train': {'pixel_opt': {'type': 'MSELoss', 'loss_weight': 1.0}}, 'path': {}}
        opt = adaptation_options(trained, weights, crops, Path(folder), None, None, losses)
        opt['manual_seed'] = draw
        Path(folder, 'adapt.yml').write_text(yaml.safe_dump(opt), encoding='utf-8')
        arguments = argparse.Namespace(
            opt=f'{folder}/adapt.yml', launcher='none', auto_resume=False, debug=False, force_yml=None
        )
        opt = parse_options(arguments, folder, is_train=True)
        model = build_model(opt)
        model.prepare()
        outside = tensors(whole)
        before = squared_error(model, model.net_g, outside)
        adapter = CachingAdapter(**{name: getattr(model.adapter, name) for name in Adapter.__dataclass_fields__})
        rows = []
        for judges in JUDGES:
            adapter.num_judges = judges
            after = squared_error(model, adapter.adapt(model.net_g, model.weights), outside)
            chosen = adapter.cross_validation
            gain = 10 * math.log10(before / after)
            rows.append({'judges': judges, 'lr': chosen.lr, 'share': chosen.share, 'gain': round(gain, 4)})
    return rows


@torch.no_grad()
def squared_error(model: nn.Module, net: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Mean squared error over images."""
    errors = []
    for lq, gt in pairs:
        restored = net(lq[None].to(model.device) / 255).clamp(0, 1)[0].cpu()
        errors.append((restored - gt / 255).square().mean().item())
    return statistics.mean(errors)


def table() -> str:
    """What each number of folds chooses, and the gain over the choice of one."""
    rows, gains = [], {judges: {} for judges in JUDGES}
    for camera, draw in CELLS:
        path = RESULTS / f'{camera}-{draw}.csv'
        if not path.is_file():
            rows.append([camera, str(draw), *['not run'] * len(JUDGES)])
            continue
        with open(path, newline='', encoding='utf-8') as file:
            of_cell = {int(row['judges']): row for row in csv.DictReader(file)}
        rows.append([camera, str(draw)])
        for judges, row in of_cell.items():
            gains[judges][camera, draw] = float(row['gain'])
            rows[-1].append(f'{gains[judges][camera, draw]:.3f} (rate {row["lr"]}, share {row["share"]})')
    for judges in JUDGES[1:]:
        if len(gains[1]) > 1:
            differences = [gains[judges][cell] - gains[1][cell] for cell in gains[1]]
            rows.append([f'{judges} folds - one', '', interval(differences), *[''] * (len(JUDGES) - 1)])
    return markdown_table(['camera', 'draw', *(f'{judges} folds, dB' for judges in JUDGES)], rows)


def main() -> None:
    """Compute the missing cells and print the table."""
    arguments = parser(__doc__)
    arguments.add_argument('--report', action='store_true', help='compute nothing')
    args = parse(arguments)
    for camera, draw in CELLS:
        path = RESULTS / f'{camera}-{draw}.csv'
        if not args.report and not path.is_file():
            write_rows(path, COLUMNS, measure(args.data, camera, draw))
            print(f'{path.stem}: done', flush=True)
    print(table())


if __name__ == '__main__':
    main()
