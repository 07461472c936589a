"""Conversion of option values by msgspec; each error is one line that names the option's key."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar, cast

import msgspec
from msgspec import Meta, inspect, structs

from drtl_plugin.errors import OptionError, unknown

# Upper bound of declared floats that have no other: it rejects infinity, and ``ge`` or ``gt`` rejects NaN.
LARGEST = sys.float_info.max


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of all option sections.

    Attributes:
        removed: By name, options that no longer exist, and what replaces each; named in the error.
    """

    removed: ClassVar[Mapping[str, str]] = {}


S = TypeVar('S', bound=Section)
N = TypeVar('N', int, float)


def parse_section(cls: type[S], mapping: Any, where: str) -> S:
    """Convert a section of an option file into its typed object.

    Numbers may be written as text, since YAML 1.1 reads ``1e-4`` as text. An empty nested section has all defaults.

    Args:
        cls (type): A subclass of :class:`Section`.
        mapping (dict | None): The section; None means all defaults.
        where (str): Its key in the option file, for error messages.

    Raises:
        OptionError: Unknown key (names the closest known one), removed key, missing key, wrong type, value out of
            range.
    """
    mapping = {} if mapping is None else mapping
    try:
        return msgspec.convert(_prepared(mapping, cls), cls)
    except msgspec.ValidationError:
        _raise_first_fault(cls, mapping, where)
        raise


def _prepared(value: Any, kind: Any) -> Any:
    """A value for msgspec's strict conversion: numbers as text are converted, empty nested sections left out."""
    members = _members(kind)
    if isinstance(value, (str, float)):
        return _as_number(value, members)
    for member in members:
        if isinstance(member, inspect.ListType) and isinstance(value, (list, tuple)):
            return [_prepared(item, member.item_type) for item in value]
        if isinstance(member, inspect.DictType) and isinstance(value, dict):
            return {key: _prepared(item, member.value_type) for key, item in value.items()}
        if isinstance(member, inspect.StructType) and isinstance(value, dict):
            fields = declared(cast('type[Section]', member.cls))
            return {
                key: _prepared(item, fields[key].type) if key in fields else item
                for key, item in value.items()
                if not (item is None and key in fields and _has_all_defaults(fields[key].type))
            }
    return value


def _as_number(value: str | float, members: Iterable[inspect.Type]) -> int | float | str:
    """Convert text, or a float without a fraction, to the declared kind of number; return anything else unchanged."""
    kinds = [_NUMBERS[type(member)] for member in members if type(member) in _NUMBERS]
    own_type = inspect.FloatType if isinstance(value, float) else inspect.StrType
    if any(isinstance(member, own_type) for member in members) or value in _choices(members):
        return value
    for kind in kinds:
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.convert(value, kind, strict=False)
    return value


def _has_all_defaults(kind: Any) -> bool:
    """Whether None means a section with all defaults."""
    return section_class(kind) is not None and not is_optional(kind)


def _raise_first_fault(cls: type[Section], mapping: Any, where: str) -> None:
    """Raise the error of the first key of a section that does not fit its declaration."""
    if not isinstance(mapping, dict):
        raise OptionError(f'{where}: expected a section of keys and values, got {mapping!r}.')
    fields = declared(cls)
    for key in mapping:
        if key not in fields:
            raise unknown_key(cls, key, where)
    for name, field in fields.items():
        if name in mapping:
            section = section_class(field.type)
            if mapping[name] is None and _has_all_defaults(field.type):
                continue
            if section is None or mapping[name] is None:
                convert(mapping[name], field.type, f'{where}.{name}')
            else:
                _raise_first_fault(section, mapping[name], f'{where}.{name}')
        elif field.required:
            raise missing(field, where)


def convert(value: Any, kind: Any, where: str) -> Any:
    """Convert one value to a declared type.

    Args:
        value: As read from the option file.
        kind: A type, which may be ``Annotated`` by ``msgspec.Meta``.
        where (str): The option's key, for error messages.

    Raises:
        OptionError: Wrong type, value out of range.
    """
    try:
        return msgspec.convert(_prepared(value, kind), kind)
    except msgspec.ValidationError:
        pass
    items = [member.item_type for member in _members(kind) if isinstance(member, inspect.ListType)]
    if items and isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            if not _fits([item], kind):
                raise OptionError(f'{where}[{i}]: {_fault(item, items[0])}')
    raise OptionError(f'{where}: {_fault(value, kind)}')


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(_prepared(value, kind), kind)
    except msgspec.ValidationError:
        return False
    return True


def number(value: Any, kind: type[N], where: str, low: float = -math.inf, high: float = math.inf) -> N:
    """Convert an option to a finite number of a kind (int or float) within a range (inclusive).

    Raises:
        OptionError: If it is not; names ``where``.
    """
    infinite = None if kind is int else LARGEST  # whole numbers are finite
    bounds = Meta(
        ge=infinite and -infinite if low == -math.inf else low,
        le=infinite if high == math.inf else high,
    )
    return cast(N, convert(value, Annotated[kind, bounds], where))


def declared(cls: type[Section]) -> dict[str, structs.FieldInfo]:
    """The declared options of a section, by name."""
    return {field.name: field for field in structs.fields(cls)}


def default(cls: type[Section], name: str) -> Any:
    """The default of an option."""
    field = declared(cls)[name]
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def description(field: structs.FieldInfo) -> str:
    """The description of a declared option; empty if it has none."""
    notes = [note for note in getattr(field.type, '__metadata__', ()) if isinstance(note, Meta)]
    return next((note.description for note in notes if note.description), '')


def missing(field: structs.FieldInfo, where: str) -> OptionError:
    """The error for a required option that is not in the file."""
    purpose = description(field)
    return OptionError(
        f'{where}.{field.name} is missing: {purpose}' if purpose else f'{where}.{field.name} is missing.'
    )


def unknown_key(cls: type[Section], key: str, where: str) -> OptionError:
    """The error for an option that a section does not have, or no longer has."""
    if key in cls.removed:
        return OptionError(f'{where}.{key} was removed: {cls.removed[key]}')
    return unknown('key', key, declared(cls), where or 'option file')


def is_optional(kind: Any) -> bool:
    """Whether a type allows None."""
    return any(isinstance(member, inspect.NoneType) for member in _members(kind))


def section_class(kind: Any) -> type[Section] | None:
    """The section that a type is, or may be; None for other types."""
    classes = (member.cls for member in _members(kind) if isinstance(member, inspect.StructType))
    return next((cls for cls in classes if issubclass(cls, Section)), None)


def _members(kind: Any) -> tuple[inspect.Type, ...]:
    """The members of a union, given as a type or as msgspec's description of it; other types are the only member."""
    info = kind if isinstance(kind, inspect.Type) else inspect.type_info(kind)
    while isinstance(info, inspect.Metadata):
        info = info.type
    return info.types if isinstance(info, inspect.UnionType) else (info,)


def _choices(members: Iterable[inspect.Type]) -> list[Any]:
    """The values of those members that are a ``Literal``."""
    return [value for member in members if isinstance(member, inspect.LiteralType) for value in member.values]


def _fault(value: Any, kind: Any) -> str:
    """Why a value does not have a type."""
    members = [member for member in _members(kind) if not isinstance(member, inspect.NoneType)]
    choices = [str(choice) for choice in _choices(members)]
    if len(members) == 1 and choices:
        return f'{value!r} is not one of {", ".join(choices)}.'
    for member in members:
        if isinstance(member, (inspect.IntType, inspect.FloatType)) and _is_number(value, member):
            return f'{value} is out of range; it must be {_range(member)}.'
    names = [_name(member) for member in members if not isinstance(member, inspect.LiteralType)]
    return f'expected {" or ".join([*names, *choices])}, got {value!r}.'


def _is_number(value: Any, kind: inspect.IntType | inspect.FloatType) -> bool:
    """Whether a value is a finite number of a kind, whatever its range."""
    number_class = _NUMBERS[type(kind)]
    return _fits(value, number_class) and abs(msgspec.convert(_prepared(value, kind), number_class)) <= LARGEST


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    low, high = kind.ge, None if kind.le == LARGEST else kind.le
    if low is not None and low > -LARGEST:
        return f'at least {low:g}' if high is None else f'between {low:g} and {high:g}'
    if kind.gt is not None:
        return f'above {kind.gt:g}' if high is None else f'above {kind.gt:g} and at most {high:g}'
    return f'at most {high:g}' if high is not None else 'finite'


def _name(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.ListType):
        item = kind.item_type
        return f'a list of {_PLURALS[type(item)]}' if type(item) in _PLURALS else 'a list'
    return _NAMES.get(type(kind), type(kind).__name__)


_NUMBERS: dict[type[inspect.Type], type[int | float]] = {inspect.IntType: int, inspect.FloatType: float}
_NAMES: dict[type[inspect.Type], str] = {
    inspect.IntType: 'a whole number',
    inspect.FloatType: 'a number',
    inspect.BoolType: 'true or false',
    inspect.StrType: 'text',
    inspect.DictType: 'a section of keys and values',
    inspect.StructType: 'a section of keys and values',
}
_PLURALS: dict[type[inspect.Type], str] = {
    inspect.IntType: 'whole numbers',
    inspect.FloatType: 'numbers',
    inspect.StrType: 'texts',
    inspect.DictType: 'sections of keys and values',
}
