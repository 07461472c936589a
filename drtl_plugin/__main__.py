"""The ``basicsr`` command, also ``python -m drtl_plugin``."""

from __future__ import annotations

import sys

import drtl_plugin


def main() -> int:
    """Run :func:`drtl_plugin.cli.main`.

    Returns:
        int: Its exit code; 2 if BasicSR is not installed.
    """
    if not drtl_plugin.has_basicsr():
        print(
            'basicsr: error: BasicSR is not installed (pip cannot build it on Python 3.13 and later); install it with: '
            f'{sys.executable} -m drtl_plugin.install',
            file=sys.stderr,
        )
        return 2
    from drtl_plugin.cli import main as run

    drtl_plugin.plug_in.registers = False  # each command imports what it needs
    return run()


if __name__ == '__main__':
    sys.exit(main())
