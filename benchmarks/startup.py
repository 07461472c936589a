"""Times from the command line to the first result, and the share of the relation in the shipped option file.

    python benchmarks/startup.py [--last FOLDER]

Commands run in processes of their own, in turn with their peers. ``--last`` names a checkout of the version to compare
with. Nothing else may run on the machine.
"""

from __future__ import annotations

import drtl_plugin  # isort: skip
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from basicsr.archs import build_network
from basicsr.models import build_model
from common import markdown_table

from drtl_plugin import preflight
from drtl_plugin.hooks import RelationHook
from drtl_plugin.options.parse import parse_options
from drtl_plugin.sources.sample import prepare_sample_data

HERE = Path(__file__).resolve().parent
OPTION_FILE = HERE.parent / 'options/drtl_x4.yml'
EDSR = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 32, 'num_block': 4, 'upscale': 4, 'res_scale': 1}
NUM_IMAGES = 100_000
# Training steps that are timed.
STEPS = 10


def run(arguments: Sequence[str], package: Path = HERE.parent) -> tuple[float, float]:
    """Run Python; returns seconds, and seconds of CPU time."""
    began = time.perf_counter()
    environment = {**os.environ, 'PYTHONPATH': str(package)}
    process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def upscale_rows(last: Path | None, repeats: int) -> list[list[str]]:
    """A 64×64 image by EDSR (32 features, 4 blocks): seconds of CPU time, medians."""
    torch.save({'params': build_network(EDSR).state_dict(), 'network': EDSR, 'scale': 4}, 'w.pth')
    cv2.imwrite('a.png', np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    upscale = ['-m', 'drtl_plugin', 'upscale', '-i', 'a.png', '-o', 'out', '--weights', 'w.pth']
    commands: dict[str, Callable[[], float]] = {
        'ours': lambda: run(upscale)[1],
        'import torch': lambda: run(['-c', 'import torch'])[1],
    }
    if last is not None:
        commands['last version'] = lambda: run(upscale, last)[1]
    for command in commands.values():
        command()  # writes the bytecode
    times = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            times[name].append(command())
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ours = seconds.pop('ours')
    return [row('`upscale` of a small image, CPU time', ours, peer, value) for peer, value in seconds.items()]


def many_images_row() -> list[list[str]]:
    """A run of one iteration on many auxiliary images, and on ten."""
    photographs = [Path('datasets/drtl_sample/auxiliary', name) for name in ('brick.png', 'grass.png', 'gravel.png')]
    seconds = {}
    for num in (10, NUM_IMAGES):
        folder = Path(f'images_{num}')
        folder.mkdir()
        for i in range(num):
            os.link(photographs[i % 3], folder / f'{i:06}.png')  # a file can have 65,000 links
        opt = yaml.safe_load(OPTION_FILE.read_text(encoding='utf-8'))
        opt['name'] = folder.name
        opt['datasets']['train'].update(dataroot_gt=str(folder), target=None)
        opt['drtl'].update(camera_fit=False, hooks=[], weighting={'relation': 'uniform'})
        opt['train']['total_iter'] = 1
        opt.pop('val')
        Path(f'{folder}.yml').write_text(yaml.safe_dump(opt), encoding='utf-8')
        seconds[num] = min(run(['-m', 'drtl_plugin', 'train', '-opt', f'{folder}.yml'])[0] for _ in range(3))
    return [row(f'a run of one iteration on {NUM_IMAGES:,} images', seconds[NUM_IMAGES], 'on 10 images', seconds[10])]


def relation_row() -> list[list[str]]:
    """Measuring the relation once, as options/drtl_x4.yml does, and the training between two measurements."""
    args = argparse.Namespace(opt=str(OPTION_FILE), launcher='none', auto_resume=False, debug=False, force_yml=None)
    opt = parse_options(args, os.getcwd(), is_train=True)
    model = build_model(opt)
    model.train_set = preflight.check(opt)['train']
    hook = next(hook for hook in model.hooks if isinstance(hook, RelationHook))
    model.hooks = []
    model.start()
    loader = torch.utils.data.DataLoader(model.train_set, batch_size=opt['datasets']['train']['batch_size_per_gpu'])
    batches = iter(loader)

    def steps(num: int) -> float:
        began = time.perf_counter()
        for _ in range(num):
            model.feed_data(next(batches))
            model.optimize_parameters(1)
        return (time.perf_counter() - began) / num

    steps(2)
    step = steps(STEPS)
    began = time.perf_counter()
    hook.measure(model)
    measuring = time.perf_counter() - began
    return [row('measuring the relation', measuring, f'{hook.interval} training steps', step * hook.interval)]


def row(what: str, ours: float, peer: str, theirs: float) -> list[str]:
    """A row of the table; times in seconds."""
    return [what, peer, f'{ours:.2f}', f'{theirs:.2f}', f'{ours / theirs:.2f}']


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--last', type=Path, metavar='FOLDER', help='checkout of the version to compare with')
    parser.add_argument('--repeats', type=int, default=5, help='runs of upscale; default: 5')
    args = parser.parse_args()
    last = args.last and args.last.resolve()
    drtl_plugin.register()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare_sample_data()
        rows = []
        for measure in (lambda: upscale_rows(last, args.repeats), many_images_row, relation_row):
            rows += measure()
            print(rows)
        os.chdir(HERE)
    print(markdown_table(['measurement', 'peer', 'ours, s', "peer's, s", 'ratio'], rows))


if __name__ == '__main__':
    main()
