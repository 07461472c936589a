"""Loader processes end with their run, and no others do."""

import subprocess
import sys

import pytest
import yaml

from drtl_plugin import cli
from tests.runtime.runs import DICE_HOOK, long_opt, start, wait_for_the_end_of  # noqa: F401


def test_an_error_leaves_no_loader_behind(workdir, long_opt):  # noqa: F811
    (workdir / 'dice.py').write_text(DICE_HOOK.replace('noise = ', 'noise = batch_idx // 0 + '))
    path = workdir / 'failing.yml'
    path.write_text(yaml.safe_dump(long_opt))
    process = start(workdir, str(path))
    process.join(60)
    assert process.exitcode == 1, (workdir / 'output.txt').read_text()
    wait_for_the_end_of(process)


# A process that has a pool of its own beside a run, as a notebook may; a pool whose worker was killed never ends.
_NOTEBOOK = """
import multiprocessing, os, sys
from drtl_plugin import cli

try:
    pool = multiprocessing.get_context('fork').Pool(1)
    worker = pool.apply(os.getpid)
    try:
        print('code', cli.main(sys.argv[1:]))
    except ZeroDivisionError:
        print('failed')
    print('only the pool is left:', [process.pid for process in multiprocessing.active_children()] == [worker])
    print('the pool works:', pool.apply_async(os.getpid).get(timeout=10) == worker)
finally:
    for process in multiprocessing.active_children():
        process.kill()
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.parametrize('fails', [False, True])
@pytest.mark.parametrize('prefetch_mode', [None, 'cpu'])
@pytest.mark.slow
def test_a_run_ends_its_own_loaders_and_no_other_process(workdir, quick_opt, write_opt, fails, prefetch_mode):
    quick_opt['datasets']['train'].update(num_worker_per_gpu=1, prefetch_mode=prefetch_mode)
    quick_opt['val'] = None
    if fails:
        quick_opt['drtl']['hooks'].append({'type': 'DiceHook'})
    (workdir / 'dice.py').write_text(DICE_HOOK.replace('noise = ', 'noise = batch_idx // 0 + '))
    command = [sys.executable, '-c', _NOTEBOOK, 'train', '-opt', write_opt(quick_opt), '--import', 'dice']
    output = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout.strip().splitlines()
    assert output[-3:] == ['failed' if fails else 'code 0', 'only the pool is left: True', 'the pool works: True']


@pytest.mark.parametrize('prefetch_mode', [None, 'cpu'])
def test_an_image_that_a_loader_cannot_read_ends_the_run(workdir, quick_opt, write_opt, capsys, prefetch_mode):
    """Rather than let it wait for the next batch forever."""
    folder = workdir / 'auxiliary'
    folder.mkdir()
    image = next((workdir / 'datasets/drtl_sample/auxiliary').iterdir())
    for number in range(70):  # more than those whose headers are read before training
        (folder / f'{number:02}{image.suffix}').symlink_to(image)
    damaged = folder / f'69{image.suffix}'
    damaged.unlink()
    damaged.write_bytes(b'damaged')
    quick_opt['datasets']['train'].update(
        dataroot_gt=str(folder), num_worker_per_gpu=1, prefetch_mode=prefetch_mode, batch_size_per_gpu=8
    )
    quick_opt['drtl']['weighting']['relation'] = 'uniform'
    quick_opt['train']['total_iter'] = 100
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith('basicsr: error: '))
    assert f'{damaged} of' in line


def test_prefetched_data_does_not_keep_a_run_from_ending(workdir, long_opt):  # noqa: F811
    long_opt['train']['total_iter'] = 2
    long_opt['datasets']['train']['prefetch_mode'] = 'cpu'
    path = workdir / 'prefetched.yml'
    path.write_text(yaml.safe_dump(long_opt))
    process = start(workdir, str(path))
    process.join(60)
    assert process.exitcode == 0, (workdir / 'output.txt').read_text()
    wait_for_the_end_of(process)
