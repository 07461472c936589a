"""What ``train``, ``test`` and ``relation`` do before they start."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from torch.utils.data import Dataset

from drtl_plugin import preflight
from drtl_plugin.commands.arguments import import_modules
from drtl_plugin.compat.basicsr import close_basicsr_logs
from drtl_plugin.options.parse import parse_options
from drtl_plugin.runtime.distributed import of_first_process
from drtl_plugin.runtime.lock import exclusive
from drtl_plugin.sources.sample import SAMPLE_ROOT, prepare_sample_data


def read_options(args: argparse.Namespace, is_train: bool) -> dict:
    """Import the user's modules, then parse the option file."""
    import_modules(args.modules)
    close_basicsr_logs()
    return parse_options(args, os.getcwd(), is_train)


def check(opt: dict, option_file: str, folder: str | Path, resumes: bool = False) -> dict[str, Dataset]:
    """Check a run before it writes anything but the sample data, which it needs if the options name it.

    Args:
        opt (dict): Parsed options.
        option_file (str): The option file.
        folder (str | Path): Folder of the run; an older one of this name is archived unless the run is resumed.
        resumes (bool): Whether the run continues an older one.

    Returns:
        dict[str, Dataset]: The datasets that were built, by phase.
    """
    if not resumes:
        preflight.check_archiving(opt, option_file, folder)
    if f"'{SAMPLE_ROOT}/" in str(opt['datasets']):
        of_first_process(prepare_sample_data)
    datasets = preflight.check(opt)
    if opt.get('val') and opt['val'].get('pbar') is None:
        opt['val']['pbar'] = sys.stderr.isatty()
    return datasets


def alone(opt: dict, folder: str) -> contextlib.AbstractContextManager:
    """A context that reserves the run's name in ``folder``, in the first of several processes."""
    return exclusive(folder, opt['name']) if opt['rank'] == 0 else contextlib.nullcontext()
