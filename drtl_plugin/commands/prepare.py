"""``basicsr prepare``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from drtl_plugin.errors import DataError
from drtl_plugin.sources.layouts import PAIRED_DATASETS, SAMPLE_ROOT

SUMMARY = 'write the sample data, or arrange a published dataset'
DESCRIPTION = (
    f'Without DATASET, write the sample data to {SAMPLE_ROOT}: images from scikit-image and five pairs of a simulated '
    'camera. train and test do this automatically when an option file needs it. With DATASET, arrange an unpacked '
    'published dataset as the option files expect. Nothing is downloaded.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a command for each dataset."""
    datasets = parser.add_subparsers(title='datasets', metavar='DATASET')
    for name, layout in PAIRED_DATASETS.items():
        doc = f'Convert {name} to support/{{gt,lq}} and val/{{gt,lq}}. Expected in SOURCE: '
        doc += ' '.join((layout.find.__doc__ or '').replace('``', '').split())
        command = datasets.add_parser(name, help='pairs from real cameras', description=doc)
        command.set_defaults(run=_prepare_pairs, dataset=name)
        command.add_argument('source', help='folder of the unpacked archive')
        command.add_argument('target', help='output folder')
        command.add_argument('--scale', type=int, default=4, help='default: 4')
        command.add_argument('--camera', help='only pairs of this camera: ' + (', '.join(layout.cameras) or 'by name'))
        command.add_argument('--lmdb', action='store_true', help='write gt.lmdb and lq.lmdb instead of folders')
    doc = 'Cut images (DIV2K, Flickr2K, …) into overlapping sub-images, for the auxiliary tasks.'
    command = datasets.add_parser('subimages', help='images for the auxiliary tasks', description=doc)
    command.set_defaults(run=_prepare_subimages)
    command.add_argument('source', nargs='+', help='folders of images')
    command.add_argument('target', help='output folder, or the output LMDB with --lmdb')
    command.add_argument('--size', type=int, default=480, help='side of the sub-images in pixels; default: 480')
    command.add_argument(
        '--step', type=int, default=240, help='distance between neighbouring sub-images in pixels; default: 240'
    )
    command.add_argument('--lmdb', action='store_true', help='write an LMDB instead of a folder')


def run(args: argparse.Namespace) -> None:
    """Write the sample data."""
    from drtl_plugin.sources.sample import prepare_sample_data

    print(f'The sample data is in {prepare_sample_data()}.')


def _prepare_pairs(args: argparse.Namespace) -> None:
    from drtl_plugin.sources.published import prepare_pairs

    counts = prepare_pairs(args.dataset, args.source, args.target, args.scale, args.camera)
    if args.lmdb:
        for folder in sorted(Path(args.target).glob('*/*')):
            _replace_by_lmdb(folder, folder.with_suffix('.lmdb'))
    print(f'{counts["support"]} pairs to adapt to and {counts["val"]} held out are in {args.target}.')


def _prepare_subimages(args: argparse.Namespace) -> None:
    from drtl_plugin.data.lmdb_files import check_lmdb_name
    from drtl_plugin.sources.published import prepare_subimages

    target = Path(args.target)
    if args.size < 8 or args.step < 1:
        raise DataError('--size must be at least 8, --step at least 1.')
    if not args.lmdb:
        num = prepare_subimages(args.source, target, args.size, args.step)
    else:
        check_lmdb_name(target)
        folder = target.with_suffix('')
        num = prepare_subimages(args.source, folder, args.size, args.step)
        _replace_by_lmdb(folder, target)
    print(f'{num} sub-images are in {target}.')


def _replace_by_lmdb(folder: Path, target: Path) -> None:
    from drtl_plugin.data.lmdb_files import write_lmdb

    write_lmdb(folder, target)
    shutil.rmtree(folder)
