"""``basicsr init``."""

from __future__ import annotations

import argparse

from drtl_plugin import shell

SUMMARY = 'write the shipped option files'
DESCRIPTION = 'Write the shipped option files to DIR/options, as a starting point for your own.'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        'folder', metavar='DIR', nargs='?', default='.', help='output folder; default: the current folder'
    )


def run(args: argparse.Namespace) -> None:
    """Write the files, and say what to do next."""
    from drtl_plugin.api.shipped import write_option_files

    files = write_option_files(args.folder)
    print(f'Wrote {len(files)} files to {files[0].parent}.')
    print(f'Next:\n  {shell.join("cd", args.folder)}\n  basicsr train -opt options/drtl_x4.yml')
