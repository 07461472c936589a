"""The ``basicsr`` command, also ``python -m drtl_plugin``: checks that BasicSR is installed before it imports it."""

from __future__ import annotations

import sys

from drtl_plugin import has_basicsr


def main() -> int:
    """Run :func:`drtl_plugin.cli.main`.

    Returns:
        int: Its exit code; 2 if BasicSR is not installed.
    """
    if not has_basicsr():
        print(
            'basicsr: error: BasicSR is not installed (pip cannot build it on Python 3.13 and later); install it by: '
            f'{sys.executable} -m drtl_plugin.install',
            file=sys.stderr,
        )
        return 2
    from drtl_plugin.cli import main as run

    return run()


if __name__ == '__main__':
    sys.exit(main())
