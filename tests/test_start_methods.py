"""Loader processes that are not forked: the default on macOS and Windows, and on Linux from Python 3.14 on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

# As `python -m drtl_plugin` on these systems: the main module is not imported again in a process that is spawned.
MAIN = """
import multiprocessing, runpy, sys
multiprocessing.set_start_method({method!r})
sys.argv = ['drtl_plugin', 'train', '-opt', {file!r}]
runpy.run_module('drtl_plugin', run_name='__main__', alter_sys=True)
"""
SRMODEL = """
name: srmodel
model_type: SRModel
scale: 4
num_gpu: 0
manual_seed: 0
datasets:
  train: {name: pairs, type: PairedImageDataset, dataroot_gt: GT, dataroot_lq: LQ, io_backend: {type: disk},
          gt_size: 64, use_hflip: true, use_rot: true, use_shuffle: true, num_worker_per_gpu: 1, batch_size_per_gpu: 2,
          dataset_enlarge_ratio: 1}
network_g: {type: EDSR, num_in_ch: 3, num_out_ch: 3, num_feat: 8, num_block: 1, upscale: 4}
path: {pretrain_network_g: ~}
train: {total_iter: 2, optim_g: {type: Adam, lr: 0.0001}, pixel_opt: {type: L1Loss},
        scheduler: {type: MultiStepLR, milestones: [10], gamma: 0.5}}
logger: {print_freq: 1, save_checkpoint_freq: 2, use_tb_logger: false}
"""


@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
@pytest.mark.parametrize('model', ['DRTLModel', 'SRModel'])
@pytest.mark.slow
def test_training(workdir, quick_opt, write_opt, method, model):
    opt = quick_opt
    opt['datasets']['train']['num_worker_per_gpu'] = 1
    if model == 'SRModel':
        folder = 'datasets/drtl_sample/camera/support'
        opt = yaml.safe_load(SRMODEL.replace('GT', f'{folder}/gt').replace('LQ', f'{folder}/lq'))
    script = MAIN.format(method=method, file=write_opt(opt))
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (workdir / 'experiments' / opt['name'] / 'models' / 'net_g_latest.pth').is_file()
