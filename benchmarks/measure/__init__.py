"""Programs that measure and append rows to results/."""

from __future__ import annotations
