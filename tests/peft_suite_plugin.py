"""A pytest plugin for PEFT's own tests: seeds each, and writes down how each ended.

Reads `PEFT_SUITE_OUTCOMES`, the file to write, and `PEFT_SUITE_FASTLORA`: "1" makes PEFT build
fastlora's layers. `tests/peft_suite.py` runs it both ways.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

_outcomes: dict[str, str] = {}
_calls = {"fastlora": 0}


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if os.environ["PEFT_SUITE_FASTLORA"] != "1":
        return
    import fastlora
    from fastlora.integrations.peft import layers
    from fastlora.integrations.peft.plan.call import Plan

    fastlora.patch_peft()
    run = layers.run

    def counted(plan: Plan, x: torch.Tensor) -> torch.Tensor:
        _calls["fastlora"] += 1
        return run(plan, x)

    layers.run = counted


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Some of PEFT's tests depend on luck; both runs shall have the same.
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


def pytest_runtest_logreport(report: Any) -> None:
    # A failure in setup or teardown counts as one of the test.
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    path = Path(os.environ["PEFT_SUITE_OUTCOMES"])
    path.write_text(json.dumps({"calls": _calls["fastlora"], "outcomes": _outcomes}))
