"""The shipped option files."""

from __future__ import annotations

import shutil
from pathlib import Path

from drtl_plugin.errors import DataError

# Inside the package in a wheel; beside it in a checkout and in editable installs.
_FOLDERS = (Path(__file__).parents[1] / 'shipped_options', Path(__file__).parents[2] / 'options')


def write_option_files(folder: str | Path) -> list[Path]:
    """Write the shipped option files, and the schema that editors check them against, to ``folder/options``.

    Args:
        folder (str | Path): Created if missing.

    Returns:
        list[Path]: The files, sorted.

    Raises:
        DataError: If one of the files already exists; nothing is written then.
    """
    source = next(path for path in _FOLDERS if path.is_dir())
    target = Path(folder, 'options')
    files = sorted(path for path in source.iterdir() if path.suffix in ('.yml', '.json'))
    for file in files:
        if (target / file.name).exists():
            raise DataError(f'{target / file.name} already exists; move it away, or choose another folder.')
    target.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(file, target / file.name)) for file in files]
