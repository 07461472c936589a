"""Arguments shared by several commands."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import drtl_plugin
from drtl_plugin.errors import OptionError, describe, own_line


def add_option_file(parser: argparse.ArgumentParser) -> None:
    """Add ``-opt``, ``--force_yml``, ``--import`` and ``--device``."""
    parser.add_argument('-opt', required=True, metavar='FILE', help='option file (YAML)')
    parser.add_argument(
        '--force_yml',
        nargs='+',
        metavar='KEY:KEY=VALUE',
        help='override options of the file, e.g. train:total_iter=500 network_g:num_feat=32 '
        '(values are read as YAML; a number in KEY is a list index)',
    )
    _add_import(parser)
    add_device(parser)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``train`` and ``test``, which are BasicSR's."""
    add_option_file(parser)
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='how a distributed run is started'
    )
    parser.add_argument('--auto_resume', action='store_true', help='resume from the last training state (train only)')
    parser.add_argument(
        '--debug',
        action='store_true',
        help='log each iteration, validate every 8 iterations, no TensorBoard; show the traceback of errors',
    )
    parser.add_argument('--local_rank', type=int, default=0, help='accepted for torch.distributed.launch; ignored')


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add ``--weights``, ``-opt`` and ``--import``."""
    parser.add_argument(
        '--weights',
        required=True,
        metavar='W',
        help='weights (.pth, .ckpt or .safetensors): net_g_….pth of an experiment, or any that spandrel recognises',
    )
    parser.add_argument(
        '-opt', dest='opt', metavar='FILE', help='option file with network_g and scale, for other weights'
    )
    _add_import(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument(
        '--device',
        default='auto',
        help='auto, cpu, cuda, cuda:N or mps; default: auto, a GPU if CUDA reports one, else the CPU',
    )


def choose_device(args: argparse.Namespace) -> None:
    """Make ``--device`` the device of this process; called before the command imports what may ask for a GPU."""
    if args.device != 'auto':
        importlib.import_module('drtl_plugin.runtime.device').choose(args.device)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--import',
        dest='modules',
        nargs='+',
        default=[],
        metavar='MODULE',
        help='your own modules to import first, e.g. with hooks or networks that register themselves; the current '
        'folder is searched, too',
    )


def import_modules(modules: Sequence[str]) -> None:
    """Import the modules named by ``--import``, also from the current folder. They may look our classes up by name.

    Raises:
        OptionError: If there is no such module, or it imports something that does not exist.
    """
    if modules:
        drtl_plugin.register()
        sys.path.insert(0, os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise OptionError(f'--import {module}: {error}{own_line(error)}.') from None
        except AssertionError as error:  # BasicSR's registries refuse a name that is taken
            raise OptionError(f'--import {module}: {describe(error)}{own_line(error)}') from None
