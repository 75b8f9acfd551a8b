"""How many examples a fuzz test runs: few in CI, as many as FASTLORA_FUZZ says otherwise.

FASTLORA_FUZZ=100000 python -m pytest tests/fuzz        # hours, other examples on every run
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

WANTED = int(os.environ.get("FASTLORA_FUZZ", "0"))


def budget(in_ci: int) -> settings:
    """`in_ci` examples, the same on every run; with FASTLORA_FUZZ that many, drawn anew."""
    return settings(
        max_examples=WANTED or in_ci,
        derandomize=not WANTED,
        deadline=None,
        database=None,
        phases=[Phase.generate] if WANTED else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
