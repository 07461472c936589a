"""The options for people and editors: a JSON schema and a reference page, generated from the declarations.

``python -m drtl_plugin.options.schema .`` writes both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from drtl_plugin.options.basicsr import SECTIONS, FileOptions, PairedDatasetOptions
from drtl_plugin.options.convert import LARGEST, Section, declared, default
from drtl_plugin.options.sections import (
    AdaptOptions,
    DRTLOptions,
    InnerOptions,
    TargetOptions,
    TaskDatasetOptions,
    WeightingOptions,
)

# Options of a dataset that BasicSR sets and nobody writes.
SET_BY_BASICSR = frozenset({'phase', 'scale'})
_DATASETS = (TaskDatasetOptions, PairedDatasetOptions)
# The headings of the reference page, in order.
_REFERENCE: dict[str, type[Section]] = {
    'The file': FileOptions,
    'datasets.train, with type DistortionTaskDataset': TaskDatasetOptions,
    'datasets.train.target': TargetOptions,
    'datasets.val…, datasets.test…, with type PairedImageDataset': PairedDatasetOptions,
    'drtl': DRTLOptions,
    'drtl.weighting': WeightingOptions,
    'drtl.inner': InnerOptions,
    'drtl.adapt': AdaptOptions,
    **SECTIONS,
}


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of option files."""
    sections = _sections()
    schema = sections.pop('FileOptions')
    properties = schema['properties']
    named: dict[str, type[Section]] = {**SECTIONS, 'drtl': DRTLOptions}
    for name, cls in named.items():
        section = {'$ref': f'#/$defs/{cls.__name__}'}
        properties[name] = {'description': properties[name]['description'], **section}
        if name != 'drtl':  # other models read further keys, and tests need fewer
            sections[cls.__name__].update(type=['object', 'null'], additionalProperties=True, required=[])
    properties['datasets'] = {
        'type': 'object',
        'description': properties['datasets']['description'],
        'properties': {'train': _if_type('DistortionTaskDataset', TaskDatasetOptions)},
        'patternProperties': {'^(val|test)(_|$)': _if_type('PairedImageDataset', PairedDatasetOptions)},
        'additionalProperties': False,
    }
    # Networks, losses and hooks of other models have sections of their own.
    schema.update(title='Option file of drtl_plugin', additionalProperties=True)
    return {'$schema': 'https://json-schema.org/draft/2020-12/schema', **schema, '$defs': sections}


def _if_type(name: str, section: type[Section]) -> dict[str, Any]:
    """A dataset whose options are known only if it has a certain type."""
    return {
        'type': 'object',
        'required': ['type'],
        'properties': {'type': {'type': 'string', 'description': f'{name}, or another dataset.'}},
        'if': {'properties': {'type': {'const': name}}},
        'then': {'$ref': f'#/$defs/{section.__name__}'},
    }


def _sections() -> dict[str, dict[str, Any]]:
    """The schema of each section, by the name of its class."""
    classes = list(_REFERENCE.values())
    schemas: dict[str, dict[str, Any]] = msgspec.json.schema_components(classes, ref_template='#/$defs/{name}')[1]
    for cls in classes:
        schema = schemas[cls.__name__]
        for name, field in declared(cls).items():
            described = schema['properties'][name]
            for bounded in (described, *described.get('anyOf', ())):
                if bounded.get('maximum') == LARGEST:  # which only rejects infinity
                    del bounded['maximum']
            if field.default_factory is not msgspec.NODEFAULT:  # which msgspec leaves out
                described['default'] = default(cls, name)
            if isinstance(field.default, msgspec.Struct):  # the section has its own defaults
                del described['default']
            if cls in _DATASETS and name in SET_BY_BASICSR:
                del schema['properties'][name]
    return schemas


def reference() -> str:
    """All options as Markdown: a table for each section."""
    source = 'Generated from `drtl_plugin/options/` by `python -m drtl_plugin.options.schema .`'
    lines = ['# Options', '', source]
    schemas = _sections()
    for heading, cls in _REFERENCE.items():
        schema = schemas[cls.__name__]
        lines += ['', f'## {heading}', '', '| key | values | default | meaning |', '|---|---|---|---|']
        for name, described in schema['properties'].items():
            default = f'`{json.dumps(described["default"])}`' if 'default' in described else ''
            if name in schema['required']:
                default = 'required'
            meaning = described.get('description', 'See the section below.').replace('|', '\\|')
            lines.append(f'| `{name}` | {_values(described)} | {default} | {meaning} |')
    return '\n'.join(lines) + '\n'


def _values(described: dict[str, Any]) -> str:
    if 'anyOf' in described:
        return ' or '.join(map(_values, described['anyOf']))
    if 'enum' in described:
        return ', '.join(f'`{json.dumps(value)}`' for value in described['enum'])
    if '$ref' in described:
        return 'object'
    kind: str = described.get('type', 'any')
    if kind == 'array' and 'type' in described['items']:
        kind = f'array of {described["items"]["type"]}'
    low, high = described.get('minimum'), described.get('maximum')
    if low is not None and high is not None:
        return f'{kind}, {low:.10g} to {high:.10g}'
    return f'{kind}, from {low:g}' if low is not None else kind


def main(folder: str) -> None:
    """Write ``options/options.schema.json`` and ``docs/options.md`` in a checkout."""
    schema = json.dumps(json_schema(), indent=1) + '\n'
    Path(folder, 'options', 'options.schema.json').write_text(schema, encoding='utf-8')
    Path(folder, 'docs', 'options.md').write_text(reference(), encoding='utf-8')


if __name__ == '__main__':
    main(*sys.argv[1:])
