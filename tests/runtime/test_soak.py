"""Two thousand iterations: nothing piles up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_WATCH_HOOK = """
import json, os
from drtl_plugin.meta import META_HOOK_REGISTRY, MetaTrainerHook

def resident(pid):
    with open(f'/proc/{pid}/statm') as file:
        return int(file.read().split()[1])

@META_HOOK_REGISTRY.register()
class WatchHook(MetaTrainerHook):
    def __init__(self):
        self.rows = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx % 100 == 99:
            with open(f'/proc/self/task/{os.getpid()}/children') as file:
                children = file.read().split()
            memory = resident('self') + sum(map(resident, children))
            self.rows.append([memory, len(os.listdir('/proc/self/fd')), len(children)])

    def after_train(self, runner):
        with open('watched.json', 'w') as file:
            json.dump(self.rows, file)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='there is no /proc')
def test_memory_files_and_processes_stay_the_same(workdir, quick_opt, write_opt):
    (workdir / 'watch.py').write_text(_WATCH_HOOK)
    quick_opt['train'].update(total_iter=2000)
    quick_opt['datasets']['train']['num_worker_per_gpu'] = 2
    quick_opt['drtl']['hooks'][0]['interval'] = 100
    quick_opt['drtl']['hooks'].append({'type': 'WatchHook'})
    quick_opt['val']['val_freq'] = 200
    quick_opt['logger'].update(print_freq=10, save_checkpoint_freq=100, keep_checkpoints=2)
    command = [sys.executable, '-m', 'drtl_plugin.cli', 'train', '-opt', write_opt(quick_opt), '--import', 'watch']
    # Freed memory goes back to the system at once, so that what is resident is what is used.
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_ARENA_MAX': '1', 'MALLOC_TRIM_THRESHOLD_': '0'}
    done = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    memory, files, children = zip(*json.loads((workdir / 'watched.json').read_text()), strict=True)
    assert len(memory) == 20
    warm = len(memory) // 4
    assert max(memory[-warm:]) < 1.01 * max(memory[warm : 2 * warm]), memory
    assert len(set(files[warm:])) == 1, files
    assert set(children) == {2}
    running = subprocess.run(['ps', '-eo', 'args'], capture_output=True, text=True).stdout
    assert str(workdir) not in running
