"""An error that the user can fix."""

from __future__ import annotations


class CliError(Exception):
    """The user gave something wrong. It is shown as one line that names the argument."""
