"""Reading option files: YAML that runs no code, and ``--force_yml``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from drtl_plugin.errors import OptionError

# More than any option file needs; a file that contains itself through an alias exceeds them.
_MAX_DEPTH, _MAX_VALUES = 30, 100_000


class OptionLoader(yaml.SafeLoader):
    """YAML's safe loader, which also reads ``1e-4`` as a number, as YAML 1.2 does."""


OptionLoader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$'), list('-+.0123456789')
)


def load_option_file(path: str) -> dict[str, Any]:
    """Read an option file with :class:`OptionLoader`; a ``!!python/...`` tag is an error and runs no code.

    Raises:
        OptionError: If the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        opt = yaml.load(Path(path).read_text(encoding='utf-8'), OptionLoader)
    except OSError as error:
        raise OptionError(f'{path}: cannot read the option file ({error.strerror}).') from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise OptionError(f'{path}: not a valid option file: {" ".join(str(error).split())}') from None
    if not isinstance(opt, dict):
        raise OptionError(f'{path}: expected an option file with keys and values.')
    return opt


def force_yml(opt: dict[str, Any], entries: Sequence[str]) -> None:
    """Apply ``--force_yml`` entries ``key:key=value`` to ``opt`` in place.

    Values are read as YAML and never evaluated. A number among the keys is an index into a list.

    Raises:
        OptionError: If an entry has no ``=``, or its section does not exist.
    """
    for entry in entries:
        path, equals, text = entry.partition('=')
        entry = ' '.join(entry.split())  # error messages are one line
        keys = [key.strip() for key in path.split(':')]
        if not equals or not all(keys):
            raise OptionError(f'--force_yml {entry}: expected key:key=value, e.g. train:ema_decay=0.999.')
        try:
            value = yaml.load(text.strip(), OptionLoader)
        except yaml.YAMLError:
            raise OptionError(f'--force_yml {entry}: {text.strip()!r} is not a YAML value.') from None
        if isinstance(value, str) and value.lower() == 'none':
            value = None
        section: Any = opt
        try:
            for key in keys[:-1]:
                section = section[_index(section, key)]
            section[_index(section, keys[-1])] = value
        except (KeyError, IndexError, TypeError, ValueError):
            raise OptionError(f'--force_yml {entry}: there is no section {":".join(keys[:-1])!r}.') from None


def _index(section: Any, key: str) -> Any:
    return int(key) if isinstance(section, list) else key


def check_tree(opt: dict[str, Any], path: str) -> None:
    """Check that all keys are text, and that the file does not contain itself.

    Raises:
        OptionError: If not; names ``path``, the option file.
    """
    level: list[Any] = [opt]
    for _ in range(_MAX_DEPTH):
        values: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        raise OptionError(f'{path}: the key {key!r} is not text; quote it or remove it.')
                values += item.values()
            elif isinstance(item, list):
                values += item
        if len(values) > _MAX_VALUES:
            break
        level = values
        if not level:
            return
    raise OptionError(f'{path}: nested too deeply or too large; does a section contain itself through an alias (*)?')
