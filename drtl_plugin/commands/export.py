"""``basicsr export``."""

from __future__ import annotations

import argparse

from drtl_plugin.commands.arguments import add_weights, import_modules

SUMMARY = 'export trained weights for use in other programs'
DESCRIPTION = 'Export a trained network for use in other programs.'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument(
        '--onnx',
        metavar='FILE',
        help='write ONNX for images of any size, and check it against the original with onnxruntime',
    )
    kinds.add_argument(
        '--spandrel',
        metavar='FILE',
        help='write weights with the layer names that spandrel (chaiNNer) expects, which differ for RCAN; as .pth, or '
        'as .safetensors with the record of the adaptation',
    )
    add_weights(parser)


def run(args: argparse.Namespace) -> None:
    """Write the file, and say where it is."""
    from drtl_plugin.api.export import export_onnx, export_spandrel, require_other_file
    from drtl_plugin.runtime.trained_network import load_trained

    require_other_file(args.onnx or args.spandrel, args.weights)
    import_modules(args.modules)
    network = load_trained(args.weights, args.opt)
    if args.spandrel is not None:
        export_spandrel(network, args.spandrel)
        print(f'The weights are in {args.spandrel}.')
        return
    difference = export_onnx(network, args.onnx)
    print(f'{args.onnx} gives the same results as {args.weights}, to within {difference:.1g}.')
    print('Input lq: RGB from 0 to 1, (1, 3, height, width). Output restored: the same, upscaled.')
