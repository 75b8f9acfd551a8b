"""The package's version, for every module: it imports nothing."""

from __future__ import annotations

__version__ = "0.1.0"
