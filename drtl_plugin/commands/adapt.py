"""``basicsr adapt``."""

from __future__ import annotations

import argparse

import drtl_plugin
from drtl_plugin.commands.arguments import add_device, add_weights, choose_device, import_modules

SUMMARY = 'adapt trained weights to your camera'
DESCRIPTION = (
    'Adapt trained weights to a camera from pairs of its images. Checks the alignment, measures the relation of the '
    'camera to the synthetic distortions, holds out each pair in turn to choose learning rate and strength of the '
    'adaptation, and averages the adapted networks. Where held-out pairs show no gain, the weights stay as they are. '
    'Writes to OUT the weights, a report, and an option file that repeats the run.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        '--pairs',
        required=True,
        metavar='DIR',
        help='folder that contains gt and lq, HR and LR, or HR and LR_x4 (for x4 weights), or images whose names end '
        'in _HR and _LR',
    )
    add_weights(parser)
    parser.add_argument('-o', '--output', required=True, metavar='OUT', help='output folder')
    parser.add_argument(
        '--auxiliary',
        metavar='DIR',
        help='folder of GT images for the auxiliary tasks; default: the GT images of the pairs',
    )
    parser.add_argument(
        '--budget',
        type=int,
        metavar='STEPS',
        help='the most training steps in all; default: 3600 for five pairs or more, fewer for fewer pairs',
    )
    parser.add_argument(
        '--loss',
        nargs='+',
        default=[],
        metavar='KIND=WEIGHT[:FILE]',
        help='losses for adaptation: pixel, msssim, frequency, perceptual (FILE: VGG19 weights), gan (FILE: a '
        'discriminator; default: a new one), e.g. pixel=1 msssim=0.2 or pixel=1 frequency=1 gan=0.1; default: pixel=1',
    )
    parser.add_argument('--register', action='store_true', help='align the images of each pair first')
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Adapt, and print the report."""
    choose_device(args)
    drtl_plugin.register()
    import_modules(args.modules)
    from drtl_plugin.api.adapt import adapt
    from drtl_plugin.commands.losses import loss_sections
    from drtl_plugin.compat.basicsr import without_gpu

    with without_gpu():
        report = adapt(
            *(args.pairs, args.weights, args.output, args.opt, args.auxiliary, args.budget, args.register),
            modules=args.modules,
            losses=loss_sections(args.loss) if args.loss else None,
        )
    print(report)
    print(f'This report and the weights, net_g_adapted_latest.pth, are in {args.output}.')
