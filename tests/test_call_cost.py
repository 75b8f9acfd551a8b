"""benchmarks/measure/call_cost.py: the gate, on a bound that holds and on one that can't."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.measure import call_cost
from fastlora.backends import native
from fastlora.cli.bench.plan import Budget

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)


@pytest.mark.parametrize(("bound", "code"), [(1000.0, 0), (0.0, 1)])
def test_the_gate(
    bound: float,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "bounds.csv"
    file.write_text(f"base,width,mode,bound\ndense,64,no grad,{bound}\n")
    monkeypatch.setattr(call_cost, "BOUNDS", file)
    monkeypatch.setattr(call_cost, "_BUDGET", Budget(rounds=5, sample_seconds=0.0002))
    assert call_cost.main(["--check", "--parts", "--only", "64 no grad"]) == code
    out = capsys.readouterr().out
    assert ("above 0.0" in out) == bool(code)
    assert "nf4 64 no grad" in out and "autograd" in out


def test_every_case_has_a_bound() -> None:
    assert list(call_cost.bounds()) == [str(case) for case in call_cost.CASES]
