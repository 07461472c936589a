"""The picture at the top of the README: crops of held-out images of a real camera (City100, Nikon D5500, x3).

Trains two networks by ``basicsr train`` with ``options/drtl_pretrain_x4.yml``: one on bicubic reduction, which is then
fine-tuned on the five pairs at rate 1e-3 (the strongest baseline), and one with the default options. Network, schedule
and data are those of ``realworld.py``; one seed. Finished runs stay in benchmarks/results/crops and are not repeated.

    python benchmarks/crops.py      # writes docs/camera.jpg
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
CAMERA, SCALE = 'city100_nikon', 3
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
# Held-out image, top and left of the crop in GT pixels. Chosen by looking at the ground truth alone.
CROPS = [('004', 220, 1010), ('074', 190, 260)]
SIDE = 144
# Title, arm, and the suffix of its folder of images.
COLUMNS = [
    ('bicubic pre-training', 'bicubic', ''),
    ('the same, fine-tuned', 'bicubic', '_adapted'),
    ('ours', 'ours', '_adapted'),
]


def experiment(arm: str) -> Path:
    """The folder of a run."""
    return RESULTS / 'experiments' / f'{CAMERA}_x{SCALE}_{arm}'


def train(data: Path, arm: str) -> None:
    """Train and adapt, unless this was done before."""
    folder = experiment(arm)
    if (folder / 'report.html').is_file():
        return
    support, val = data / CAMERA / 'support', data / CAMERA / 'val'
    changes = [
        f'name={folder.name}',
        f'scale={SCALE}',
        f'network_g:upscale={SCALE}',
        f'datasets:train:dataroot_gt={data / "bsds500_train"}',
        f'datasets:train:gt_size={LQ_SIZE * SCALE}',
        'datasets:train:num_support=2',
        'datasets:train:num_query=2',
        f'datasets:train:target:dataroot_gt={support / "hr"}',
        f'datasets:train:target:dataroot_lq={support / f"lr_x{SCALE}"}',
        f'datasets:val:dataroot_gt={val / "hr"}',
        f'datasets:val:dataroot_lq={val / f"lr_x{SCALE}"}',
        f'drtl:hooks=[{{type: RelationHook, interval: {ITERATIONS // 2}, transfer_steps: 10}}]',
        f'drtl:adapt:steps={ADAPTATION}',
        'train:amp=bf16',
        f'train:total_iter={ITERATIONS}',
        f'train:scheduler:periods=[{ITERATIONS}]',
        f'val:val_freq={ITERATIONS}',
        'val:save_img=true',
        f'val:metrics:psnr_y:crop_border={SCALE}',
        f'val:metrics:ssim_y:crop_border={SCALE}',
        f'logger:save_checkpoint_freq={ITERATIONS}',
        'logger:use_tb_logger=false',
        *ARMS[arm],
    ]
    command = [sys.executable, '-m', 'drtl_plugin', 'train', '-opt', str(OPTION_FILE), '--force_yml', *changes]
    RESULTS.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, cwd=RESULTS, check=True)


def psnr(folder: Path, suffix: str) -> float:
    """Mean PSNR-Y (dB) over the ten held-out images, at the end of a run."""
    with open(folder / 'metrics.csv', newline='', encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if row['metric'] == 'psnr_y']
    return float([row['value'] for row in rows if row['dataset'] == f'sample_camera{suffix}'][-1])


def draw(data: Path, path: Path) -> None:
    """A row for each crop."""
    num = len(COLUMNS) + 2
    figure = Figure(figsize=(2.4 * num, 2.4 * len(CROPS) + 0.5), layout='constrained')
    for line, (image, top, left) in zip(figure.subplots(len(CROPS), num, squeeze=False), CROPS, strict=True):
        gt = cv2.imread(str(data / CAMERA / 'val' / 'hr' / f'{image}.png'))
        lq = cv2.imread(str(data / CAMERA / 'val' / f'lr_x{SCALE}' / f'{image}.png'))
        upsampled = cv2.resize(lq, gt.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        cells = [(f'bicubic upsampling\n{psnr(experiment("ours"), "_bicubic"):.2f} dB', upsampled)]
        for title, arm, suffix in COLUMNS:
            folder = experiment(arm)
            (file,) = (folder / f'visualization{suffix}' / image).glob('*.png')
            cells.append((f'{title}\n{psnr(folder, suffix):.2f} dB', cv2.imread(str(file))))
        cells.append(('ground truth\n', gt))
        for ax, (title, picture) in zip(line, cells, strict=True):
            ax.imshow(picture[top : top + SIDE, left : left + SIDE, ::-1], interpolation='nearest')
            ax.set_title(title if image == CROPS[0][0] else '', fontsize=13)
            ax.axis('off')
    figure.savefig(path, dpi=120, pil_kwargs={'quality': 90})


def main() -> None:
    """Train what is missing, and draw."""
    arguments = parser(__doc__)
    arguments.add_argument('-o', '--output', type=Path, default=HERE.parent / 'docs' / 'camera.jpg')
    args = parse(arguments)
    for arm in tqdm(ARMS, unit='run', disable=None):
        train(args.data.resolve(), arm)
    draw(args.data, args.output)
    print(f'Wrote {args.output}.')


if __name__ == '__main__':
    main()
