"""What the words promise: examples of docs/extending.md are run as a user would, all commands are taken."""

import csv
import re
import shlex
import sys

import pytest
import yaml
from basicsr.utils.registry import METRIC_REGISTRY

from drtl_plugin import cli
from drtl_plugin.hooks import META_HOOK_REGISTRY
from tests.conftest import OPTIONS

ROOT = OPTIONS.parent
TEXT = (ROOT / 'docs/extending.md').read_text(encoding='utf-8')


def merge(into: dict, other: dict) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        elif isinstance(value, list) and key == 'hooks':
            into[key] = [*into.get(key, []), *value]
        else:
            into[key] = value


def test_the_examples_run(workdir, quick_opt, write_opt, monkeypatch):
    code = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
    options = [yaml.safe_load(block) for block in re.findall(r'```yaml\n(.*?)```', TEXT, re.DOTALL)]
    assert len(code) == len(options) == 4
    (workdir / 'my_parts.py').write_text('\n'.join(code))
    monkeypatch.syspath_prepend(workdir)
    for registry in (META_HOOK_REGISTRY, METRIC_REGISTRY, DISTORTION_REGISTRY, ESTIMATOR_REGISTRY):
        monkeypatch.setattr(registry, '_obj_map', dict(registry._obj_map))
    for section in options:
        merge(quick_opt, section)
    quick_opt['drtl']['weighting'].update(effective_tasks=1.5)
    try:
        assert cli.main(['train', '--import', 'my_parts', '-opt', write_opt(quick_opt)]) == 0
        assert 'spectrum' in ESTIMATOR_REGISTRY
    finally:
        sys.modules.pop('my_parts', None)
    root = workdir / 'experiments' / quick_opt['name']
    (log,) = root.glob('train_*.log')
    assert 'weighs most.' in log.read_text()
    with open(root / 'metrics.csv', newline='') as file:
        errors = [float(row['value']) for row in csv.DictReader(file) if row['metric'] == 'mae']
    assert errors and all(0 < error < 255 for error in errors)
    with open(root / 'weights.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert any(row['task'].startswith('vignette') for row in rows)
    relations = {row['relation'] for row in rows}
    assert len(relations) > 1  # spectra were compared


@pytest.mark.parametrize(
    'path', [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))], ids=lambda path: path.name
)
def test_commands_are_taken(path):
    """Each ``basicsr …`` in a block of its own, and each option file that is named."""
    blocks = re.findall(r'^```\n(.*?)^```', path.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)
    for line in '\n'.join(blocks).splitlines():
        if line.startswith('basicsr ') and 'error:' not in line:
            arguments = shlex.split(line, comments=True)[1:]
            cli._parser().parse_args(arguments)
            for argument in arguments:
                if argument.startswith('options/'):
                    assert (ROOT / argument).is_file(), line
