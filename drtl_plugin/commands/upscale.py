"""``basicsr upscale``."""

from __future__ import annotations

import argparse

from drtl_plugin.commands.arguments import add_device, add_weights, choose_device, import_modules
from drtl_plugin.errors import DataError

SUMMARY = 'restore images with trained weights'
DESCRIPTION = (
    'Restore one image or a folder of images with a trained network. Greyscale, alpha, 16-bit depth, the colour '
    'profile, EXIF and XMP are kept where the output format allows. Images that cannot be '
    'restored are reported and skipped.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('-i', '--input', required=True, metavar='IN', help='image or folder')
    parser.add_argument(
        '-o', '--output', required=True, metavar='OUT', help='output folder; for a single image, also a file'
    )
    add_weights(parser)
    parser.add_argument('--tile', type=int, default=512, help='tile size in input pixels, 0 for no tiles; default: 512')
    parser.add_argument('--overlap', type=int, default=32, help='tile overlap in input pixels; default: 32')
    parser.add_argument('--suffix', default='', help='text to append to the output file names')
    parser.add_argument('--ext', default='auto', help='output format, e.g. png; default: that of each image')
    add_device(parser)
    parser.add_argument('--fp32', action='store_true', help='on a GPU, compute in single instead of half precision')


def run(args: argparse.Namespace) -> None:
    """Restore the images, and say where they are.

    Raises:
        DataError: If images could not be restored.
    """
    choose_device(args)
    import_modules(args.modules)
    from drtl_plugin.api.upscale import upscale
    from drtl_plugin.runtime.trained_network import load_trained

    network = load_trained(args.weights, args.opt)
    options = {'tile': args.tile, 'overlap': args.overlap, 'suffix': args.suffix, 'ext': args.ext}
    written, failed = upscale(network, args.input, args.output, **options, full_precision=args.fp32)
    if len(written) == 1:
        print(f'The restored image is {written[0]}.')
    elif written:
        print(f'{len(written)} restored images are in {args.output}.')
    if failed:
        raise DataError(f'{len(failed)} of {len(written) + len(failed)} images could not be restored.')
