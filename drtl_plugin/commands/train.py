"""``basicsr train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import drtl_plugin
from drtl_plugin.commands.arguments import add_run as add_arguments
from drtl_plugin.commands.arguments import choose_device

SUMMARY = 'train with an option file'
DESCRIPTION = 'Train with an option file. An existing run of the same name is renamed, not overwritten.'
__all__ = ['DESCRIPTION', 'SUMMARY', 'add_arguments', 'run']


def run(args: argparse.Namespace) -> None:
    """Train; a model that has ``finish`` reports the results."""
    choose_device(args)
    drtl_plugin.register()
    from drtl_plugin.commands.runs import alone, check, read_options
    from drtl_plugin.runtime import loop
    from drtl_plugin.runtime.resume import continue_if_restarted

    opt = read_options(args, is_train=True)
    restarted = continue_if_restarted(opt)
    datasets = check(opt, args.opt, opt['path']['experiments_root'], restarted or _resumes(opt))

    def finish(model: Any) -> None:
        if hasattr(model, 'finish') and opt['rank'] == 0:
            print(model.finish(args.modules))

    with alone(opt, 'experiments'):
        loop.train(opt, args.opt, datasets, finish, restarted)


def _resumes(opt: dict) -> bool:
    """Whether the run continues an older one, and so keeps its folder."""
    if opt['auto_resume']:
        return any(Path(opt['path']['training_states']).glob('[0-9]*.state'))
    return bool(opt['path'].get('resume_state'))
