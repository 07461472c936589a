"""What starting costs, and when BasicSR's registries are filled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import drtl_plugin

COMMANDS = ('adapt', 'upscale', 'train', 'test', 'relation', 'export', 'prepare', 'lmdb', 'init')
# Imported by a process that runs only the arguments.
HEAVY = ('torch', 'cv2', 'numpy', 'basicsr', 'mmengine', 'matplotlib')


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', script, *arguments], capture_output=True, text=True)


def seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


# prepare realsr: its help shows the layouts of published datasets.
@pytest.mark.parametrize(
    'arguments', [[], ['--version'], ['prepare', 'realsr', '--help'], *([c, '--help'] for c in COMMANDS)]
)
def test_help_and_wrong_command_lines_import_nothing_heavy(arguments):
    script = 'import runpy, sys, atexit\n'
    script += f'atexit.register(lambda: print("imported", *sorted(set(sys.modules) & set({HEAVY}))))\n'
    script += 'sys.argv[0] = "basicsr"; runpy.run_module("drtl_plugin", run_name="__main__", alter_sys=True)'
    before = seconds_of_children()
    result = run(script, *(arguments or ['--help']))
    assert seconds_of_children() - before < 1.5
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == 'imported'


@pytest.mark.parametrize('arguments', [['adpt'], ['adapt'], ['upscale', '--weights', 'w.pth'], ['lmdb', 'x', '--no']])
def test_wrong_command_lines_answer_at_once(arguments):
    before = seconds_of_children()
    command = [sys.executable, '-m', 'drtl_plugin', *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert seconds_of_children() - before < 1.5
    assert result.returncode == 2
    assert result.stderr.startswith('usage: basicsr')


def test_the_help_lists_every_command_adapt_and_upscale_first():
    text = subprocess.run([sys.executable, '-m', 'drtl_plugin', '--help'], capture_output=True, text=True).stdout
    listed = [
        line.split()[0]
        for line in text.partition('COMMAND\n')[2].splitlines()
        if line.startswith('    ') and line[4] != ' '
    ]
    assert listed == list(COMMANDS)
    examples = [line.split()[1] for line in text.splitlines() if line.startswith('  basicsr ')]
    assert examples[:2] == ['adapt', 'upscale']
    files = {path.stem for path in (Path(drtl_plugin.__file__).parent / 'commands').glob('*.py')}
    assert set(COMMANDS) <= files


REGISTERED = """
from basicsr.utils import registry
names = {
    'MODEL': ['DRTLModel', 'DRTLAdaptModel'],
    'DATASET': ['DistortionTaskDataset', 'FewShotPairDataset'],
    'ARCH': ['DistortionRelationNet'],
    'LOSS': ['FFTLoss', 'MSSSIMLoss', 'VGGPerceptualLoss'],
    'METRIC': ['calculate_pyiqa'],
}
for kind, wanted in names.items():
    assert all(name in getattr(registry, f'{kind}_REGISTRY') for name in wanted), kind
from basicsr.utils import FileClient
assert FileClient._backends['lmdb'].__name__ == 'SharedLmdbBackend'
print('registered')
"""


@pytest.mark.parametrize(
    'imports',
    [
        'import drtl_plugin; from basicsr.train import train_pipeline',
        'import drtl_plugin.runtime.progress',  # a module that imports BasicSR itself
        'from drtl_plugin.hooks import META_HOOK_REGISTRY',
        'import drtl_plugin.models.drtl_adapt_model',
        'from drtl_plugin.sources.published import prepare_pairs',
    ],
)
@pytest.mark.slow
def test_registries_are_filled_when_basicsr_is_imported(imports):
    result = run(f'{imports}\n{REGISTERED}')
    assert result.stdout == 'registered\n', result.stderr


def test_registries_are_filled_at_once_where_basicsr_is_there_already():
    # As if BasicSR could be imported without repairs.
    script = 'import drtl_plugin, sys; drtl_plugin.plug_in.registers = False; import basicsr\n'
    script += 'assert "drtl_plugin.models" not in sys.modules\n'
    script += 'del sys.modules["drtl_plugin"]; import drtl_plugin\n'
    result = run(script + REGISTERED)
    assert result.stdout == 'registered\n', result.stderr


def test_importing_the_package_is_cheap_and_registering_twice_harmless():
    script = f'import drtl_plugin, sys; assert not set(sys.modules) & set({HEAVY})\n'
    script += 'drtl_plugin.register(); drtl_plugin.register()\n'
    result = run(script + REGISTERED)
    assert result.stdout == 'registered\n', result.stderr


def test_another_thread_that_imports_basicsr_meanwhile_is_served_too():
    script = """
import importlib.machinery, sys, threading
import drtl_plugin
drtl_plugin.plug_in.registers = False
inside, served = threading.Event(), []

class Slow(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == 'drtl_plugin.losses':
            inside.set()
            other.join()
        return None

def find():
    inside.wait()
    served.append(drtl_plugin.plug_in in sys.meta_path)

sys.meta_path.insert(1, Slow)
other = threading.Thread(target=find)
other.start()
import drtl_plugin.losses
assert served == [True] and sys.meta_path[0] is drtl_plugin.plug_in
print('served')
"""
    result = run(script)
    assert result.stdout == 'served\n', result.stderr


def test_a_loader_of_many_modules_is_left_as_it_is():
    script = """
import importlib, importlib.machinery, importlib.util, inspect, sys
import drtl_plugin
drtl_plugin.plug_in.registers = False
wanted = ('drtl_plugin.hooks', 'drtl_plugin.meta', 'json.tool')

class Shared:
    executed = []
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        self.executed.append(module.__name__)
        loader = importlib.machinery.SourceFileLoader(module.__name__, module.__file__)
        loader.exec_module(module)
    def hello(self):
        return 'hello'

class Finder:
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name in wanted else None
        if spec is not None:
            spec.loader = shared
        return spec

shared = Shared()
sys.meta_path.insert(1, Finder())
assert importlib.util.find_spec('drtl_plugin.meta').loader.hello() == 'hello'
for name in wanted:
    module = importlib.import_module(name)
    assert module.__loader__ is module.__spec__.loader is shared
assert set(vars(shared)) == set() and shared.executed == list(wanted)
importlib.reload(sys.modules['drtl_plugin.meta'])
assert shared.executed == [*wanted, 'drtl_plugin.meta']
assert 'class' in inspect.getsource(importlib.import_module('basicsr.models.base_model'))
print('left')
"""
    result = run(script)
    assert result.stdout == 'left\n', result.stderr
