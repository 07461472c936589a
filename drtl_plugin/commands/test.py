"""``basicsr test``."""

from __future__ import annotations

import argparse

import drtl_plugin
from drtl_plugin.commands.arguments import add_run as add_arguments
from drtl_plugin.commands.arguments import choose_device

SUMMARY = 'test with an option file'
DESCRIPTION = 'Test with an option file. Metrics go to the log, images to results/.'
__all__ = ['DESCRIPTION', 'SUMMARY', 'add_arguments', 'run']


def run(args: argparse.Namespace) -> None:
    """Test, and say where the results are."""
    choose_device(args)
    drtl_plugin.register()
    from drtl_plugin.commands.runs import alone, check, read_options
    from drtl_plugin.runtime import loop

    opt = read_options(args, is_train=False)
    datasets = check(opt, args.opt, opt['path']['results_root'])
    with alone(opt, 'results'):
        loop.test(opt, datasets)
    if opt['rank'] == 0:
        what = 'The images and the log are' if opt['val']['save_img'] else 'The log is'
        print(f'{what} in {opt["path"]["results_root"]}.')
