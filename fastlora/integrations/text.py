"""Reports as text."""

from __future__ import annotations

import io
from typing import Any


def as_text(report: Any, terminal: bool = False) -> str:
    """What rich prints of `report`: on a terminal in its width and colours, else in 140 columns."""
    from rich.console import Console

    buffer = io.StringIO()
    width = None if terminal else 140
    Console(file=buffer, force_terminal=terminal, width=width).print(report)
    return buffer.getvalue().rstrip()
