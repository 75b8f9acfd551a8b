"""The regression gate: a few named cases for pytest-benchmark, left out of `make test`.

pytest benchmarks --benchmark-save=before
pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastlora.backends import native
from fastlora.cli.bench.case import Case, Layer
from fastlora.cli.bench.measure import Bench, Refused
from fastlora.cli.bench.plan import Budget

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(native.unavailable_reason() is not None, reason="times the native kernels"),
]

CASES = {
    "nf4 decode": Case(Layer(4096, 4096, quant="nf4"), 1, "inference"),
    "nf4 step, few tokens": Case(Layer(4096, 4096, quant="nf4", dropout=0.05), 16, "step"),
    "nf4 step": Case(Layer(2048, 2048, quant="nf4", dropout=0.05), 512, "step"),
    "nf4 step, small layer": Case(Layer(576, 576, quant="nf4", dropout=0.05), 128, "step"),
    "bf16 step": Case(Layer(2048, 2048, dropout=0.05), 512, "step"),
    "fp32 step": Case(Layer(2048, 2048, dtype="fp32", quant="nf4"), 128, "step"),
    "dequantize": Case(Layer(4096, 4096, R=0, quant="nf4"), 0, "dequantize"),
}


@pytest.mark.parametrize("name", CASES)
def test_speed(name: str, benchmark: BenchmarkFixture) -> None:
    case = CASES[name]
    provider = "fastlora-out" if case.mode == "dequantize" else "fastlora"
    calls = Bench([provider], Budget()).calls(case)[provider]
    assert not isinstance(calls, Refused), calls
    turn = 0

    def call() -> None:
        nonlocal turn
        calls[turn % len(calls)]()
        turn += 1

    benchmark.pedantic(call, rounds=40, iterations=max(1, len(calls)), warmup_rounds=2)
