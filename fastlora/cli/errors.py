"""The error that a person at the terminal can mend."""

from __future__ import annotations


class CliError(Exception):
    """Something that the user gave is wrong: shown as one line, which names the argument."""
