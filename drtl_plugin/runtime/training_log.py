"""The records of a run: log file, TensorBoard, losses and times."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

from basicsr.train import init_tb_loggers
from basicsr.utils import AvgTimer, MessageLogger, get_env_info, get_root_logger, get_time_str
from basicsr.utils.options import dict2str

from drtl_plugin.compat.basicsr import restore_wandb_generate_id
from drtl_plugin.runtime.progress import seconds_aside


class StepTimer(AvgTimer):
    """``AvgTimer`` that excludes work done :func:`~drtl_plugin.runtime.progress.aside`, e.g. validation."""

    def start(self) -> None:
        super().start()
        self._aside = seconds_aside()

    def record(self) -> None:
        self.tic += seconds_aside() - self._aside
        super().record()
        self._aside = seconds_aside()


class StepLogger(MessageLogger):
    """``MessageLogger`` that computes ``eta`` from the remaining steps, and adds learning rates to TensorBoard."""

    def __init__(self, opt: dict, start_iter: int, tb_logger: Any) -> None:
        super().__init__(opt, start_iter, tb_logger)
        self.max_iters += 1  # BasicSR leaves the last iteration out: its eta is negative there

    def __call__(self, log_vars: dict) -> None:
        # BasicSR divides the seconds since start_time by the iterations since start_iter: here, those of one step.
        self.start_iter, self.start_time = log_vars['iter'], time.time() - log_vars['time']
        if self.tb_logger is not None:
            for group, lr in enumerate(log_vars['lrs']):
                self.tb_logger.add_scalar(f'lr_{group}' if group else 'lr', lr, log_vars['iter'])
        super().__call__(log_vars)


def open_log(opt: dict, phase: str) -> logging.Logger:
    """BasicSR's logger with a new log file, which starts with the versions and the options.

    Args:
        opt (dict): Parsed options.
        phase (str): ``train`` or ``test``.
    """
    file = Path(opt['path']['log'], f'{phase}_{opt["name"]}_{get_time_str()}.log')
    logger = get_root_logger(log_level=logging.INFO, log_file=str(file))
    logger.info(get_env_info())
    logger.info(dict2str(opt))
    return logger


def open_tensorboard(opt: dict, first_iter: int) -> Any:
    """BasicSR's TensorBoard (and wandb) writer with the option files as text; None if it is off.

    Args:
        opt (dict): Parsed options.
        first_iter (int): The iteration to resume from, else 0.
    """
    if (opt['logger'].get('wandb') or {}).get('project'):
        restore_wandb_generate_id()
    tb_logger = init_tb_loggers(opt)
    if tb_logger is not None:
        for path in sorted(Path(opt['path']['experiments_root']).glob('*.yml')):
            text = path.read_text(encoding='utf-8')
            tb_logger.add_text(f'options/{path.name}', f'```yaml\n{text}\n```', first_iter)
    return tb_logger


def keep_option_file(option_file: str, folder: str) -> None:
    """Copy an option file to a run's folder, with the time and the command, unless it is the copy of a resumed run."""
    kept = Path(folder, Path(option_file).name)
    if kept.exists() and kept.samefile(option_file):
        return
    # BasicSR's function writes in the locale's encoding, which may not be able to represent the command.
    head = f'# GENERATE TIME: {time.asctime()}\n# CMD:\n# {" ".join(sys.argv)}\n\n'
    kept.write_text(head + Path(option_file).read_text(encoding='utf-8'), encoding='utf-8')
