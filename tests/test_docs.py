"""README and docs: their examples run, their commands parse, and their links lead somewhere."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from basicsr.utils.registry import METRIC_REGISTRY

import drtl_plugin
from drtl_plugin import cli
from drtl_plugin.hooks import META_HOOK_REGISTRY
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY
from drtl_plugin.tasks.distortions import DISTORTION_REGISTRY
from tests.conftest import OPTIONS

ROOT = OPTIONS.parent
TEXT = (ROOT / 'docs/extending.md').read_text(encoding='utf-8')
ARCHITECTURE = (ROOT / 'docs/architecture.md').read_text(encoding='utf-8')
PAGES = [*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'docs').glob('*.md'))]
CODE_BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def code_lines(page: Path) -> list[str]:
    """The lines of a page's code blocks that name no language: commands (continued ones joined), output, trees."""
    blocks = CODE_BLOCK.findall(page.read_text(encoding='utf-8'))
    return [line for language, block in blocks if not language for line in block.replace('\\\n', ' ').splitlines()]


def without_code_blocks(page: Path) -> str:
    """The text of a page."""
    return CODE_BLOCK.sub('', page.read_text(encoding='utf-8'))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r'^#+ (.+)$', without_code_blocks(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


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


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_command_in_a_code_block_parses(page):
    for line in code_lines(page):
        words = shlex.split(line, comments=True)
        if words[:1] == ['basicsr']:
            arguments = words[1:]
        elif 'drtl_plugin' in words and words[words.index('drtl_plugin') - 1] == '-m':
            arguments = words[words.index('drtl_plugin') + 1 :]
        else:
            continue
        cli._parser().parse_args(arguments)
        for argument in arguments:
            if argument.startswith('options/'):
                assert (ROOT / argument).is_file(), line


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_command_within_a_sentence_exists_with_its_flags(page, capsys):
    for command, rest in re.findall(r'`basicsr (\w+)([^`]*)`', without_code_blocks(page)):
        with pytest.raises(SystemExit, match='0'):
            cli._parser().parse_args([command, '--help'])
        known = set(re.findall(r'(?<![\w-])-{1,2}[a-z][\w-]*', capsys.readouterr().out))
        flags = set(re.findall(r'(?<![\w-])-{1,2}[a-z][\w-]*', rest))
        assert flags <= known, command


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', without_code_blocks(page)):
        if target.startswith(('https://', 'http://')):
            continue
        name, _, anchor = target.partition('#')
        file = (page.parent / name) if name else page
        assert file.is_file(), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    """Files of the repository, and of the package without ``drtl_plugin/`` in front."""
    if page.name == 'CHANGELOG.md':  # names what is gone
        return
    for name in re.findall(r'`((?:\w+/)+\w+\.(?:py|yml|json|md))`', without_code_blocks(page)):
        parents = [parent for parent in (ROOT, ROOT / 'drtl_plugin') if (parent / name.split('/')[0]).is_dir()]
        # A folder of neither is the user's own.
        assert not parents or any((parent / name).is_file() for parent in parents), name


def test_the_tree_of_the_architecture_exists():
    (tree,) = (block for language, block in CODE_BLOCK.findall(ARCHITECTURE) if language == 'text')
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        if name.endswith('/'):
            folders.append(name)
        folder = ROOT.joinpath(*folders)
        assert folder.is_dir(), folder
        for file in re.findall(r'\w+\.(?:py|html)', line):
            assert (folder / file).is_file(), folder / file


def test_every_make_target_that_is_named_exists():
    targets = set(
        re.search(r'^\.PHONY: (.+)$', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.MULTILINE)[1].split()
    )
    for page in PAGES:
        text = page.read_text(encoding='utf-8')
        assert set(re.findall(r'(?:^|`)make ([a-z][a-z-]*)', text, re.MULTILINE)) <= targets, page.name


def test_every_page_is_listed_in_the_index():
    linked = set(re.findall(r'\]\((\w+\.md)\)', (ROOT / 'docs/README.md').read_text(encoding='utf-8')))
    assert linked == {page.name for page in (ROOT / 'docs').glob('*.md')} - {'README.md'}


def test_the_readme_is_short():
    assert len((ROOT / 'README.md').read_text(encoding='utf-8').splitlines()) < 200


def test_the_citation_is_valid():
    command = [Path(sys.executable).parent / 'check-jsonschema', '--builtin-schema', 'vendor.citation-file-format']
    subprocess.run([*command, ROOT / 'CITATION.cff'], check=True)
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert citation['version'] == drtl_plugin.__version__
