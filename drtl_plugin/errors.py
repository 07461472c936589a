"""Errors that users can fix; the command line prints them as one line and exits with code 2."""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_STANDARD_LIBRARY = sysconfig.get_path('stdlib')
# Folders of installed packages; dist-packages is Debian's.
_INSTALLED = {'site-packages', 'dist-packages'}


class DRTLError(Exception):
    """One line: what is wrong, where (file or option key), and what to do about it."""


class OptionError(DRTLError):
    """An option is invalid."""


class DataError(DRTLError):
    """A folder, image, LMDB or checkpoint is missing, damaged or does not fit the options."""


def describe(error: Exception) -> str:
    """Type and message of an exception in one line."""
    return f'{type(error).__name__}: {" ".join(str(error).split())}'.removesuffix(': ')


def own_line(error: Exception) -> str:
    """``' (FILE:LINE)'`` of the innermost line of a traceback in the user's own code; empty if there is none.

    Installed packages, the standard library, BasicSR and this plug-in are not the user's own code.
    """
    place = ''
    for frame, line in traceback.walk_tb(error.__traceback__):
        if _is_own(frame.f_code.co_filename, frame.f_globals.get('__name__', '')):
            place = f' ({frame.f_code.co_filename}:{line})'
    return place


def _is_own(file: str, module: str) -> bool:
    path = Path(file)
    if module.partition('.')[0] in ('basicsr', 'drtl_plugin'):  # may be an editable installation
        return False
    return path.is_file() and not _INSTALLED & set(path.parts) and not path.is_relative_to(_STANDARD_LIBRARY)


def unknown(kind: str, name: object, known: Iterable[str], where: str) -> OptionError:
    """The error for an unknown name.

    Args:
        kind (str): What is named, e.g. ``'distortion'``.
        name (object): The name as the user wrote it.
        known (Iterable[str]): The known names.
        where (str): The option key, e.g. ``'drtl.inner'``.

    Returns:
        OptionError: Suggests a similar known name, or lists all of them.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    hint = f'did you mean {near[0]!r}?' if near else f'known: {", ".join(known)}.'
    return OptionError(f'{where}: unknown {kind} {str(name)!r}; {hint}')


def registered(registry: Any, name: object, kind: str, where: str) -> Any:
    """Look up a name in one of BasicSR's registries.

    Args:
        registry (Registry): Of ``basicsr.utils.registry``.
        name (object): Name in the option file.
        kind (str), where (str): As in :func:`unknown`.

    Raises:
        OptionError: If the name is unknown.
    """
    for candidate in (name, f'{name}_basicsr'):  # BasicSR registers some of its classes with this suffix
        if isinstance(candidate, str) and candidate in registry:
            return registry.get(candidate)
    raise OptionError(f'{unknown(kind, name, registry.keys(), where)} --import MODULE registers your own.')
