"""The options for people and editors, made of :mod:`drtl_plugin.options.parse`: a JSON schema and a reference.

``python -m drtl_plugin.options.schema .`` writes both.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from drtl_plugin.options.parse import (
    SECTIONS,
    AdaptOptions,
    DRTLOptions,
    FileOptions,
    InnerOptions,
    PairedDatasetOptions,
    TargetOptions,
    TaskDatasetOptions,
    WeightingOptions,
)

_TYPES = {bool: 'boolean', int: 'integer', float: 'number', str: 'string', dict: 'object', list: 'array'}
# What BasicSR, or the plug-in, sets, and nobody writes.
_NOT_WRITTEN = {'camera_fit', 'phase', 'scale'}


def json_schema() -> dict:
    """JSON schema (draft 2020-12) of option files."""
    schema = _section(FileOptions)
    properties = schema['properties']
    properties['num_gpu'] = {**properties['num_gpu'], 'type': ['integer', 'string']}  # or auto
    for name, section in {**SECTIONS, 'drtl': DRTLOptions}.items():
        properties[name] = {**_section(section), 'description': properties[name]['description']}
        if name != 'drtl':  # models of others read more, and tests need less
            properties[name].update(type=['object', 'null'], additionalProperties=True, required=[])
    paired, tasks = _section(PairedDatasetOptions), _section(TaskDatasetOptions, _NOT_WRITTEN)
    properties['datasets'] = {
        'type': 'object',
        'description': properties['datasets']['description'],
        'properties': {'train': _if_type('DistortionTaskDataset', tasks)},
        'patternProperties': {'^(val|test)(_|$)': _if_type('PairedImageDataset', paired)},
        'additionalProperties': False,
    }
    # Networks, losses and hooks of other models have sections of their own.
    schema.update(additionalProperties=True)
    return {'$schema': 'https://json-schema.org/draft/2020-12/schema', 'title': 'Option file of drtl_plugin', **schema}


def _if_type(name: str, section: dict) -> dict:
    """A section of which only one type is known here."""
    return {
        'type': 'object',
        'required': ['type'],
        'properties': {'type': {'type': 'string', 'description': f'{name}, or another dataset.'}},
        'if': {'properties': {'type': {'const': name}}},
        'then': section,
    }


def _section(section: type, left_out: set[str] = frozenset()) -> dict:
    hints = get_type_hints(section)
    properties, required = {}, []
    for field in dataclasses.fields(section):
        if field.name in left_out:
            continue
        properties[field.name] = _property(hints[field.name], field)
        if _is_required(field):
            required.append(field.name)
    return {'type': 'object', 'properties': properties, 'required': required, 'additionalProperties': False}


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _property(kind: Any, field: dataclasses.Field) -> dict:
    described = _kind(kind)
    if 'doc' in field.metadata:
        described['description'] = field.metadata['doc']
    if not _is_required(field) and not dataclasses.is_dataclass(_default(field)):
        described['default'] = _default(field)
    for name, key in (('minimum', 'low'), ('maximum', 'high')):
        if math.isfinite(field.metadata.get(key, math.inf)):
            described[name] = field.metadata[key]
    return described


def _kind(kind: Any) -> dict:
    arguments = get_args(kind)
    if kind is Any:
        return {}
    if dataclasses.is_dataclass(kind):
        return _section(kind)
    if get_origin(kind) is Literal:
        return {'enum': list(arguments)}
    if get_origin(kind) is Union:  # Optional
        (kind,) = (argument for argument in arguments if argument is not type(None))
        described = _kind(kind)
        if 'enum' in described:
            return {'enum': [*described['enum'], None]}
        return {**described, 'type': [described['type'], 'null']}
    if get_origin(kind) is list:
        return {'type': 'array', 'items': _kind(arguments[0])}
    return {'type': _TYPES[kind]}


# The headings of the reference, in order.
_REFERENCE = {
    'The file': FileOptions,
    'datasets.train, of type DistortionTaskDataset': TaskDatasetOptions,
    'datasets.train.target': TargetOptions,
    'datasets.val…, datasets.test…, of type PairedImageDataset': PairedDatasetOptions,
    'drtl': DRTLOptions,
    'drtl.weighting': WeightingOptions,
    'drtl.inner': InnerOptions,
    'drtl.adapt': AdaptOptions,
    **SECTIONS,
}


def reference() -> str:
    """All options as Markdown: a table for each section."""
    source = 'Generated from `drtl_plugin/options/parse.py` by `python -m drtl_plugin.options.schema .`'
    lines = ['# Options', '', source]
    for heading, section in _REFERENCE.items():
        left_out = _NOT_WRITTEN if section is TaskDatasetOptions else frozenset()
        described = _section(section, left_out)
        lines += ['', f'## {heading}', '', '| key | values | default | meaning |', '|---|---|---|---|']
        for name, value in described['properties'].items():
            default = f'`{json.dumps(value["default"])}`' if 'default' in value else ''
            if name in described['required']:
                default = 'must be set'
            meaning = value.get('description', 'A section of its own, below.').replace('|', '\\|')
            lines.append(f'| `{name}` | {_values(value)} | {default} | {meaning} |')
    return '\n'.join(lines) + '\n'


def _values(described: dict) -> str:
    if 'enum' in described:
        return ', '.join(f'`{json.dumps(value)}`' for value in described['enum'])
    kinds = described.get('type', 'any')
    text = ' or '.join([kinds] if isinstance(kinds, str) else kinds)
    low, high = described.get('minimum'), described.get('maximum')
    if low is not None and high is not None:
        return f'{text}, {low:g} to {high:g}'
    return f'{text}, from {low:g}' if low is not None else text


def main(folder: str) -> None:
    """Write ``options/options.schema.json`` and ``docs/options.md`` in a checkout."""
    schema = json.dumps(json_schema(), indent=1) + '\n'
    Path(folder, 'options', 'options.schema.json').write_text(schema, encoding='utf-8')
    Path(folder, 'docs', 'options.md').write_text(reference(), encoding='utf-8')


if __name__ == '__main__':
    main(*sys.argv[1:])
