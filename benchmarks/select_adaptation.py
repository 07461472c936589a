r"""Choose the settings of ``drtl.adapt`` on held-out support pairs: all folds, and no validation image.

    basicsr train -opt options/drtl_x4.yml
    python benchmarks/select_adaptation.py -opt options/drtl_x4.yml \
        --weights experiments/drtl_x4/models/net_g_latest.pth

Each support pair is held out in turn. The camera is fitted to the other pairs, the relation measured on them, and the
network adapted to them with each combination of settings. Prints the PSNR-Y of the pairs that were held out, and the
difference to the first combination with its 95 % interval. (If the option file uses the pairs in training,
the network has been trained with all of them.)
"""

from __future__ import annotations

# Before torch: common imports drtl_plugin, which repairs BasicSR.
from common import interval, markdown_table

import argparse  # isort: skip
import itertools
import os
import statistics

import msgspec
import torch
from basicsr.metrics.psnr_ssim import calculate_psnr_pt
from basicsr.models import build_model

import drtl_plugin
from drtl_plugin.meta.adaptation import last
from drtl_plugin.models import DRTLModel
from drtl_plugin.options.parse import parse_options


def model_of(option_file: str, weights: str, names: list[str]) -> DRTLModel:
    """The model of an option file, with these weights and the pairs of these names, ready to adapt."""
    args = argparse.Namespace(
        opt=option_file,
        force_yml=[f'path:pretrain_network_g={weights}', f'datasets:train:target:names=[{", ".join(names)}]'],
        launcher='none',
        auto_resume=False,
        debug=False,
    )
    model = build_model(parse_options(args, os.getcwd(), is_train=True))
    model.start()
    return model


@torch.no_grad()
def psnr(net: torch.nn.Module, lq: torch.Tensor, gt: torch.Tensor) -> float:
    """PSNR-Y of an image ``(3, h, w)``, uint8, without a border of ``scale`` pixels."""
    restored = (net(lq[None] / 255) * 255).round().clamp(0, 255) / 255
    scale = gt.shape[-1] // lq.shape[-1]
    return calculate_psnr_pt(restored, gt[None] / 255, crop_border=scale, test_y_channel=True).item()


def main() -> None:
    """Measure all combinations on all folds."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('-opt', required=True, help='option file')
    arguments.add_argument('--weights', required=True, help='network before adaptation')
    arguments.add_argument('--lr', nargs='+', type=float, default=[3e-4, 1e-3], help='default: 3e-4 and 1e-3')
    arguments.add_argument('--replay', nargs='+', type=float, default=[0.5, 0.0], help='default: 0.5 and 0')
    args = arguments.parse_args()
    drtl_plugin.register()
    target = parse_options(
        argparse.Namespace(opt=args.opt, force_yml=None, launcher='none', auto_resume=False, debug=False),
        os.getcwd(),
        is_train=True,
    )['datasets']['train']['target']
    names = sorted(os.path.splitext(file)[0] for file in os.listdir(target['dataroot_gt']))
    whole = model_of(args.opt, args.weights, names)
    pairs = dict(zip(names, whole.target_pairs, strict=True))
    combinations = list(itertools.product(args.lr, args.replay))
    scores: dict[tuple[float, float] | None, list[float]] = {None: [], **{both: [] for both in combinations}}
    for name, (lq, gt) in pairs.items():
        model = model_of(args.opt, args.weights, [other for other in names if other != name])
        scores[None].append(psnr(model.trained_network(), lq, gt))
        options = model.adapter.options
        for lr, replay in combinations:
            model.adapter.options = msgspec.structs.replace(options, lr=lr, replay=replay)
            course = model.adapter.course(model.trained_network(), model.weights, model.target_pairs, options.steps)
            scores[lr, replay].append(psnr(last(course), lq, gt))
            print(f'{name} held out, lr {lr:g}, replay {replay:g}: {scores[lr, replay][-1]:.2f} dB', flush=True)
    first = scores[combinations[0]]
    rows = [
        [
            'before adaptation' if both is None else f'lr {both[0]:g}, replay {both[1]:g}',
            f'{statistics.mean(values):.2f}',
            interval([a - b for a, b in zip(values, first, strict=True)]) if values is not first else '',
        ]
        for both, values in scores.items()
    ]
    print(markdown_table(['settings', 'PSNR-Y, held-out pairs', 'against the first'], rows))


if __name__ == '__main__':
    main()
