"""The errors that a user can mend; the command line prints them as one line and exits with code 2."""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_STANDARD_LIBRARY = sysconfig.get_path('stdlib')
# Folders of installed packages: of an environment, of a user, of Debian.
_INSTALLED = {'site-packages', 'dist-packages'}


class DRTLError(Exception):
    """What is wrong, where (file or option key) and what to do about it, in one line."""


class OptionError(DRTLError):
    """An option file says something that cannot be carried out."""


class DataError(DRTLError):
    """A folder, an image or an LMDB is not what the options promise."""


def describe(error: Exception) -> str:
    """The type and message of an exception, in one line."""
    return f'{type(error).__name__}: {" ".join(str(error).split())}'.removesuffix(': ')


def own_line(error: Exception) -> str:
    """``' (FILE:LINE)'``, the innermost line of a traceback that is in a module of the user; empty if there is none.

    The user can change that line, unlike those of installed packages, the standard library, BasicSR and this plug-in.
    """
    place = ''
    for frame, line in traceback.walk_tb(error.__traceback__):
        if _is_own(frame.f_code.co_filename, frame.f_globals.get('__name__', '')):
            place = f' ({frame.f_code.co_filename}:{line})'
    return place


def _is_own(file: str, module: str) -> bool:
    path = Path(file)
    if module.partition('.')[0] in ('basicsr', 'drtl_plugin'):  # which may be installed as editable
        return False
    return path.is_file() and not _INSTALLED & set(path.parts) and not path.is_relative_to(_STANDARD_LIBRARY)


def unknown(kind: str, name: object, known: Iterable[str], where: str) -> OptionError:
    """The error for a name that does not exist.

    Args:
        kind (str): What the name stands for, e.g. ``'distortion'``.
        name: The name as the user wrote it.
        known (Iterable[str]): The names that exist.
        where (str): The option key, e.g. ``'drtl.inner'``.

    Returns:
        OptionError: Names the nearest known name, or all of them where none is near.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    hint = f'did you mean {near[0]!r}?' if near else f'known: {", ".join(known)}.'
    return OptionError(f'{where}: unknown {kind} {str(name)!r}; {hint}')


def registered(registry: Any, name: object, kind: str, where: str) -> Any:
    """What a registry of BasicSR has under a name.

    Args:
        registry: One of ``basicsr.utils.registry``.
        name (object): Name in the option file.
        kind (str), where (str): As of :func:`unknown`.

    Raises:
        OptionError: If there is nothing.
    """
    for candidate in (name, f'{name}_basicsr'):  # BasicSR finds a few of its classes with this suffix only
        if isinstance(candidate, str) and candidate in registry:
            return registry.get(candidate)
    raise OptionError(f'{unknown(kind, name, registry.keys(), where)} --import MODULE registers your own.')
