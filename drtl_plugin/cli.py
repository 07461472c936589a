"""The ``basicsr`` command: its arguments, and how errors end it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import traceback
from collections.abc import Sequence

import drtl_plugin
from drtl_plugin.errors import DRTLError

# Modules of drtl_plugin.commands, in the order of the help.
_COMMANDS = ('adapt', 'upscale', 'train', 'test', 'relation', 'export', 'prepare', 'lmdb', 'init')
_DESCRIPTION = """\
BasicSR with distortion-relation guided transfer learning (DRTL).

  basicsr adapt --pairs DIR --weights W -o OUT  adapt trained weights to your camera
  basicsr upscale -i IN -o OUT --weights W      restore images
  basicsr train -opt options/drtl_x4.yml        train, adapt to the camera, report the gain
  basicsr test -opt options/test_drtl_x4.yml    test a trained network
  basicsr relation -opt options/adapt_x4.yml    show which synthetic distortions resemble your camera
  basicsr lmdb FOLDER FOLDER.lmdb               turn a folder of images into an LMDB
  basicsr prepare                               write the sample data; with a name, arrange RealSR, City100, …

Any BasicSR option file works, including those of plain BasicSR models. Training writes to experiments/, testing to
results/ and TensorBoard to tb_logger/, all in the current folder.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv (Sequence[str] | None): Arguments, ``sys.argv[1:]`` by default.

    Returns:
        int: 0; or 2 if the options, the data or the disk are unusable, after printing one line that says what is
        wrong, where, and what to do; or 130 after an interrupt.

    Raises:
        SystemExit: If a signal ended the training, with 128 plus its number as the exit code.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        _end_dist()
    except DRTLError as error:
        if getattr(args, 'debug', False):
            traceback.print_exc()
        lines = str(error).strip().splitlines()
        # A loader process puts its traceback in front of the error.
        is_traced = len(lines) > 1 and 'Error: ' in lines[-1]
        return _failed(lines[-1].partition('Error: ')[2] if is_traced else ' '.join(lines))
    except OSError as error:
        return _failed(' '.join(str(error).split()))
    except KeyboardInterrupt:
        return _failed('interrupted.', 130)
    except Exception:
        if _is_distributed():
            traceback.print_exc()
            _abandon(1)
        raise
    return 0


def _failed(line: str, code: int = 2) -> int:
    with contextlib.suppress(OSError):  # nobody reads it
        print(f'basicsr: error: {line}', file=sys.stderr, flush=True)
    _abandon(code)
    return code


def _is_distributed() -> bool:
    """Whether there are other processes; without torch imported, there are none."""
    torch = sys.modules.get('torch')
    return torch is not None and torch.distributed.is_initialized()


def _end_dist() -> None:
    if _is_distributed():
        importlib.import_module('drtl_plugin.runtime.distributed').end_dist()


def _abandon(code: int) -> None:
    if _is_distributed():
        importlib.import_module('drtl_plugin.runtime.distributed').abandon(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='basicsr', description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--version', action=_Version, nargs=0, help='show the versions and exit')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for name in _COMMANDS:
        module = importlib.import_module(f'drtl_plugin.commands.{name}')
        command = commands.add_parser(name, help=module.SUMMARY, description=module.DESCRIPTION)
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser


class _Version(argparse.Action):
    """Prints the versions of this package and of BasicSR, without importing BasicSR."""

    def __call__(self, parser, *_) -> None:
        metadata = importlib.import_module('importlib.metadata')
        print(f'drtl_plugin {drtl_plugin.__version__} (basicsr {metadata.version("basicsr")})')
        parser.exit()


if __name__ == '__main__':
    sys.exit(main())
