"""The picture at the top of the README: crops of held-out images of two real cameras.

Trains two networks for each camera by ``basicsr train`` with ``options/drtl_pretrain_x4.yml``: one on bicubic
reduction, which is then fine-tuned on the five pairs at rate 1e-3 (the strongest baseline), and one with the default
options. Network, schedule and data are those of ``realworld.py``; one seed. Finished runs stay in
benchmarks/results/crops and are not repeated.

    python benchmarks/crops.py      # writes docs/cameras.jpg
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from common import HERE, LQ_SIZE, parse, parser

import cv2  # isort: skip
from matplotlib.figure import Figure
from tqdm import tqdm

RESULTS = HERE / 'results' / 'crops'
OPTION_FILE = HERE.parent / 'options' / 'drtl_pretrain_x4.yml'
# 16 patches a step. Measuring the relation (18 tasks, 10 steps of 8 patches) counts as 90 steps.
ITERATIONS, ADAPTATION = 1910, 1000
ARMS = {
    'bicubic': [
        'datasets:train:distortions=[{name: bicubic}]',
        'drtl:camera_fit=false',
        'drtl:weighting:relation=uniform',
        'drtl:adapt:lr=1.0e-3',
        'drtl:adapt:warmup=0',
        'drtl:adapt:replay=0',
    ],
    'ours': [],
}
# Folder, name, scale, held-out image, and the top left corner and side of the crop in GT pixels. Crops were chosen by
# looking at the ground truth alone.
CAMERAS = [
    ('city100_nikon', 'Nikon D5500, x3', 3, '004', (220, 1010), 144),
    ('city100_iphone', 'iPhone X, x2', 2, '044', (160, 300), 100),
]
# Title, arm, and the suffix of its folder of images.
COLUMNS = [
    ('trained on bicubic reduction', 'bicubic', ''),
    ('… fine-tuned on five pairs', 'bicubic', '_adapted'),
    ('ours, five pairs', 'ours', '_adapted'),
]


def experiment(camera: str, scale: int, arm: str) -> Path:
    """The folder of a run."""
    return RESULTS / 'experiments' / f'{camera}_x{scale}_{arm}'


def train(data: Path, camera: str, scale: int, arm: str) -> None:
    """Train and adapt, unless this was done before."""
    folder = experiment(camera, scale, arm)
    if (folder / 'report.html').is_file():
        return
    support, val = data / camera / 'support', data / camera / 'val'
    changes = [
        f'name={folder.name}',
        f'scale={scale}',
        f'network_g:upscale={scale}',
        f'datasets:train:dataroot_gt={data / "bsds500_train"}',
        f'datasets:train:gt_size={LQ_SIZE * scale}',
        'datasets:train:num_support=2',
        'datasets:train:num_query=2',
        f'datasets:train:target:dataroot_gt={support / "hr"}',
        f'datasets:train:target:dataroot_lq={support / f"lr_x{scale}"}',
        f'datasets:val:dataroot_gt={val / "hr"}',
        f'datasets:val:dataroot_lq={val / f"lr_x{scale}"}',
        f'drtl:hooks=[{{type: RelationHook, interval: {ITERATIONS // 2}, transfer_steps: 10}}]',
        f'drtl:adapt:steps={ADAPTATION}',
        'train:amp=bf16',
        f'train:total_iter={ITERATIONS}',
        f'train:scheduler:periods=[{ITERATIONS}]',
        f'val:val_freq={ITERATIONS}',
        'val:save_img=true',
        f'val:metrics:psnr_y:crop_border={scale}',
        f'val:metrics:ssim_y:crop_border={scale}',
        f'logger:save_checkpoint_freq={ITERATIONS}',
        'logger:use_tb_logger=false',
        *ARMS[arm],
    ]
    command = [sys.executable, '-m', 'drtl_plugin', 'train', '-opt', str(OPTION_FILE), '--force_yml', *changes]
    RESULTS.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, cwd=RESULTS, check=True)


def psnr(folder: Path, suffix: str) -> float:
    """Mean PSNR-Y (dB) of the ten held-out images, at the end."""
    with open(folder / 'metrics.csv', newline='', encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if row['metric'] == 'psnr_y']
    return float([row['value'] for row in rows if row['dataset'] == f'sample_camera{suffix}'][-1])


def draw(data: Path, path: Path) -> None:
    """A row for each camera."""
    num = len(COLUMNS) + 2
    figure = Figure(figsize=(2.4 * num, 2.75 * len(CAMERAS)), layout='constrained')
    axes = figure.subplots(len(CAMERAS), num, squeeze=False)
    for line, (camera, name, scale, image, (top, left), side) in zip(axes, CAMERAS):
        gt = cv2.imread(str(data / camera / 'val' / 'hr' / f'{image}.png'))
        lq = cv2.imread(str(data / camera / 'val' / f'lr_x{scale}' / f'{image}.png'))
        upsampled = cv2.resize(lq, gt.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        upsampled_psnr = psnr(experiment(camera, scale, 'ours'), '_bicubic')
        cells = [(f'{name}\nbicubic upsampling', upsampled, upsampled_psnr)]
        for title, arm, suffix in COLUMNS:
            folder = experiment(camera, scale, arm)
            (file,) = (folder / f'visualization{suffix}' / image).glob('*.png')
            cells.append((f'\n{title}', cv2.imread(str(file)), psnr(folder, suffix)))
        cells.append(('\nground truth', gt, None))
        for ax, (title, picture, decibels) in zip(line, cells):
            crop = picture[top : top + side, left : left + side, ::-1]
            ax.imshow(crop, interpolation='nearest')
            ax.set_title(title, fontsize=10)
            ax.set_xlabel('' if decibels is None else f'{decibels:.2f} dB', fontsize=11)
            ax.set_xticks([])
            ax.set_yticks([])
    figure.savefig(path, dpi=140, pil_kwargs={'quality': 90})


def main() -> None:
    """Train what is missing, and draw."""
    arguments = parser(__doc__)
    arguments.add_argument('-o', '--output', type=Path, default=HERE.parent / 'docs' / 'cameras.jpg')
    args = parse(arguments)
    runs = [(camera, scale, arm) for camera, _, scale, *_ in CAMERAS for arm in ARMS]
    for run in tqdm(runs, unit='run', disable=None):
        train(args.data.resolve(), *run)
    draw(args.data, args.output)
    print(f'Wrote {args.output}.')


if __name__ == '__main__':
    main()
