"""Fidelity and perceptual scores of a small GAN-trained RRDBNet, adapted to the sample camera with several losses.

Two stages of pre-training (400 steps with GAN weight 0.05, then 150 with 0.5), then 100 adaptation steps for each loss
and seed, without camera fit and relation: about 3 minutes on one CPU core. Scores are means over the held-out pairs.
Needs ``pip install --no-deps piqa``, whose metrics download no weights::

    python benchmarks/perceptual.py FOLDER
"""

from __future__ import annotations

# Before torch, to shorten the spinning of its threads.
import drtl_plugin  # noqa: F401  isort: skip
import argparse
import copy
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import piqa
import torch
import yaml
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.metrics.niqe import calculate_niqe
from basicsr.utils import img2tensor, tensor2img

from drtl_plugin import cli
from drtl_plugin.runtime.trained_network import load_trained

OPTIONS = Path(__file__).resolve().parent.parent / 'options' / 'drtl_esrgan_x4.yml'
COLUMNS = ('PSNR-Y', 'SSIM-Y', 'MS-SSIM', 'GMSD (lower)', 'HaarPSI', 'NIQE (lower)', 'sharpness/GT')
MSSSIM, FREQUENCY = {'type': 'MSSSIMLoss', 'loss_weight': 0.2}, {'type': 'FFTLoss', 'loss_weight': 1.0}
LOSSES: dict[str, dict] = {
    'L1': {},
    'L1 + MS-SSIM 0.2': {'msssim_opt': MSSSIM},
    'L1 + frequency 1': {'frequency_opt': FREQUENCY},
    'L1 + frequency 1 + GAN 0.1, its discriminator': {'frequency_opt': FREQUENCY, 'gan': True},
    'L1 + frequency 1 + GAN 0.1, new discriminator': {'frequency_opt': FREQUENCY, 'gan': False},
}


def train(opt: dict) -> Path:
    """Run ``basicsr train``; returns the folder of its networks."""
    path = Path(f'{opt["name"]}.yml')
    path.write_text(yaml.safe_dump(opt), encoding='utf-8')
    if cli.main(['train', '-opt', str(path)]):
        sys.exit(1)
    return Path('experiments', opt['name'], 'models')


def scores(weights: Path, val: dict) -> list[float]:
    """COLUMNS, each the mean over the validation pairs."""
    net, rows = load_trained(str(weights)).net, []
    for path in sorted(Path(val['dataroot_gt']).iterdir()):
        gt, lq = cv2.imread(str(path)), cv2.imread(str(Path(val['dataroot_lq'], path.name)))
        with torch.no_grad():
            restored = tensor2img(net(img2tensor(lq.astype(np.float32) / 255)[None]))
        images = [img2tensor(image[4:-4, 4:-4].astype(np.float32) / 255)[None] for image in (restored, gt)]
        details = [cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.CV_64F).std() for image in (restored, gt)]
        rows.append([metric(restored, gt, 4, test_y_channel=True) for metric in (calculate_psnr, calculate_ssim)])
        rows[-1] += [float(metric()(*images)) for metric in (piqa.MS_SSIM, piqa.GMSD, piqa.HaarPSI)]
        rows[-1] += [calculate_niqe(restored, 4), details[0] / details[1]]
    return np.mean(rows, axis=0).tolist()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', help='folder to work in')
    parser.add_argument('--seeds', type=int, default=2, help='of adaptation; default: 2')
    args = parser.parse_args()
    os.makedirs(args.folder, exist_ok=True)
    os.chdir(args.folder)
    opt = yaml.safe_load(OPTIONS.read_text(encoding='utf-8'))
    opt['network_g'].update(num_feat=16, num_block=1, num_grow_ch=8)
    opt['datasets']['train'].update(gt_size=64, num_support=1, num_query=1, num_worker_per_gpu=0)
    opt['drtl'].update(camera_fit=False, weighting={'relation': 'uniform'}, hooks=[])
    opt['drtl']['adapt'].update(steps=0)
    opt['logger']['use_tb_logger'] = False
    val = opt['datasets'].pop('val')
    del opt['val']
    first, second = copy.deepcopy(opt), copy.deepcopy(opt)
    first.update(name='first')
    first['train']['gan_opt']['loss_weight'] = 0.05
    first['train']['scheduler']['eta_min'] = 1e-5
    models = train(first)
    second.update(name='second')
    second['path'].update({f'pretrain_network_{x}': str(models / f'net_{x}_latest.pth') for x in 'gd'})
    second['train'].update(total_iter=150, scheduler={'type': 'MultiStepLR', 'milestones': [1000]}, ema_decay=0.9)
    second['train']['optim_g']['lr'] = 3e-4
    second['train']['gan_opt']['loss_weight'] = 0.5
    models = train(second)
    rows = {('not adapted', ''): scores(models / 'net_g_latest.pth', val)}
    for i, (name, losses) in enumerate(LOSSES.items()):
        adapted = {key: copy.deepcopy(opt[key]) for key in ('scale', 'num_gpu', 'datasets', 'network_g')}
        adapted['drtl'] = {**opt['drtl'], 'adapt': {**opt['drtl']['adapt'], 'steps': 100}}
        adapted.update(model_type='DRTLAdaptModel', path={'pretrain_network_g': str(models / 'net_g_latest.pth')})
        adapted['path']['param_key_g'] = 'params_ema'
        adapted['train'] = {'pixel_opt': opt['train']['pixel_opt'], **losses}
        if 'gan' in losses:
            adapted['network_d'] = opt['network_d']
            adapted['train'].update(gan_opt={**opt['train']['gan_opt'], 'loss_weight': 0.1})
            adapted['train']['optim_d'] = opt['train']['optim_d']
            if adapted['train'].pop('gan'):
                adapted['path']['pretrain_network_d'] = str(models / 'net_d_latest.pth')
        for seed in range(args.seeds):
            run = train({**adapted, 'name': f'adapted_{i}_{seed}', 'manual_seed': seed})
            rows[name, seed] = scores(run / 'net_g_adapted_latest.pth', val)
    print('| losses | seed |', ' | '.join(COLUMNS), '|\n|---|---|', '---|' * len(COLUMNS))
    for (name, seed), row in rows.items():
        print(f'| {name} | {seed} |', ' | '.join(f'{value:.4f}' for value in row), '|')


if __name__ == '__main__':
    main()
