"""Errors that the user can fix, and the one that is best found early."""

from __future__ import annotations

import tempfile
from pathlib import Path


class CliError(Exception):
    """The user gave something wrong. It is shown as one line that names the argument."""


def check_writable(flag: str, path: Path) -> None:
    """Raises a CliError unless `path` can be made, or written to where it is a folder.

    Tried by a file that is removed at once, since permissions don't tell all; nothing is left.
    """
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CliError(f"{flag}: can't write to {folder}: {error.strerror}") from None
