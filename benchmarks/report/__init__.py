"""Programs that read rows or compiled kernels and write tables, plots and gates."""

from __future__ import annotations
