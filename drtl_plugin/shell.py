"""Command lines to paste into the shell of this system."""

from __future__ import annotations

import os
import shlex
import subprocess


def join(*words: object) -> str:
    """Words as one command line, quoted where needed: for POSIX shells, or on Windows for cmd.exe and PowerShell."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == 'nt' else shlex.join(texts)
