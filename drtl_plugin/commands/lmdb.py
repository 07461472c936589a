"""``basicsr lmdb``."""

from __future__ import annotations

import argparse

SUMMARY = 'turn a folder of images into an LMDB'
DESCRIPTION = (
    'Turn a folder of images into an LMDB in the BasicSR layout: the keys are the file names without extension, the '
    'values are PNG files, and meta_info.txt lists them. Use it with io_backend: {type: lmdb}.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('folder', help='folder of images')
    parser.add_argument('lmdb', help='output LMDB; its name must end in .lmdb')
    parser.add_argument(
        '--strip', default='', metavar='ENDING', help='suffix to remove from keys: with x4, babyx4.png becomes baby'
    )
    parser.add_argument(
        '--compress_level', type=int, choices=range(10), default=1, metavar='0-9', help='PNG compression level'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace an existing LMDB of this name')


def run(args: argparse.Namespace) -> None:
    """Write the LMDB."""
    from drtl_plugin.data.lmdb_files import write_lmdb

    num = write_lmdb(args.folder, args.lmdb, args.strip, args.compress_level, args.overwrite)
    print(f'{num} images are in {args.lmdb}.')
