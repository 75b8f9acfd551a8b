"""Every result against its bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import track

from ... import ops, reference
from ...backends import BACKENDS
from ...backends.contract import Request
from .case import BASES, DTYPES, Base, Case

# M, N, K, R. Odd sizes: no multiple of a tile, a vector or a 4-bit block in any direction; one row
# and few rows (kernels for generation), enough rows for several tiles, and enough work that threads
# share it.
_SIZES = (
    (1, 96, 128, 64),
    (7, 131, 65, 16),
    (37, 64, 192, 3),
    (129, 101, 131, 1),
    (70, 259, 320, 8),
    (521, 387, 449, 24),
)
_QUICK_SIZES = ((1, 96, 128, 64), (17, 67, 65, 3), (129, 64, 192, 16))
_DROPOUT = 0.1


@dataclass
class Cell:
    """The cases of one op, base and dtype: the worst error over its bound, and what failed."""

    cases: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, ratio: float, what: str) -> None:
        """Counts a result whose error is `ratio` times what it may be."""
        self.cases += 1
        self.worst = max(self.worst, ratio)
        if ratio > 1.0:
            self.failures.append(what)


# (op, base) -> column of the table -> cell
Results = dict[tuple[str, str], dict[str, Cell]]


def check(
    backends: Sequence[str],
    device: str,
    *,
    quick: bool = False,
    sizes: Sequence[tuple[int, int, int, int]] | None = None,
    stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
) -> dict[str, Results]:
    """Runs the ops of `backends` on `device` and measures each result against its bound.

    Args:
        backends: names of backends that support the device.
        device: "cpu" or "cuda".
        quick: fewer sizes.
        sizes: (M, N, K, R) instead of the command's own.
        stop: asked before each case; True leaves the rest out.
        console: shows a bar while it runs, if given and a terminal.
    """
    found: dict[str, Results] = {backend: {} for backend in backends}
    sizes = sizes or (_QUICK_SIZES if quick else _SIZES)
    cases = [
        Case(base, names, base.fit(size), dropout, column, device)
        for base, dropout in itertools.product(BASES, (0.0, _DROPOUT))
        for column, combinations in DTYPES.items()
        for names, size in itertools.product(combinations, sizes)
        # A dense weight has the dtype that it is computed in.
        if base.quant_type is not None or names[2] is None
    ]
    with _poisoned_memory():
        for backend, results in found.items():
            _check_4bit(backend, device, sizes, results)
        for case in track(
            cases,
            description="checking",
            console=console,
            transient=True,
            disable=console is None or not console.is_terminal,
        ):
            if stop():
                break
            able = [b for b in backends if _takes(b, device, case.base)]
            if not able:
                continue
            for backend, op, result, ratio in case.ratios(able):
                row = found[backend].setdefault((op, str(case.base)), {})
                row.setdefault(case.column, Cell()).add(ratio, f"{op} {case.base} {result}: {case}")
    return found


def _takes(backend: str, device: str, base: Base) -> bool:
    """False for a backend that leaves layers on such a weight to others, as CUDA's dense ones."""
    return BACKENDS[backend].unsupported(_request(device, base)) is None


def unsupported(backend: str, device: str) -> str | None:
    """Why a backend runs no layer on a device, or None."""
    if any(_takes(backend, device, base) for base in BASES):
        return None
    return BACKENDS[backend].unsupported(_request(device, BASES[-1]))


def _request(device: str, base: Base) -> Request:
    return Request("lora_linear_fwd", device, four_bit=base.quant_type is not None)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN: an element that a kernel forgets to write is then seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _check_4bit(
    backend: str, device: str, sizes: Sequence[tuple[int, int, int, int]], results: Results
) -> None:
    """The 4-bit ops, bit for bit: a ratio of 0, or infinity where a bit differs."""
    quantises = BACKENDS[backend].unsupported(Request("quantize_4bit", device)) is None
    columns = ("float32", "bfloat16", "float16")
    for base, name, size in itertools.product(BASES[1:], columns, sizes):
        assert base.quant_type is not None
        _, N, K, _ = base.fit(size)
        dtype = getattr(torch, name)
        generator = torch.Generator().manual_seed(N + K)
        weight = torch.randn(N, K, generator=generator).to(device, dtype)
        settings = (None, base.quant_type, base.nested)
        expected, expected_state = reference.quantize_4bit(weight, *settings)
        equal_by_op = {}
        if quantises:
            packed, state = ops.quantize_4bit(weight, *settings, backend=backend)
            equal_by_op["quantize_4bit"] = torch.equal(packed, expected) and torch.equal(
                state.absmax, expected_state.absmax
            )
        decoded = ops.dequantize_4bit(expected, expected_state, dtype, backend=backend)
        equal_by_op["dequantize_4bit"] = torch.equal(
            decoded, reference.dequantize_4bit(expected, expected_state, dtype)
        )
        for op, equal in equal_by_op.items():
            column = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[name]
            results.setdefault((op, str(base)), {}).setdefault(column, Cell()).add(
                0.0 if equal else math.inf, f"{op} {base}: {name}, N={N} K={K}"
            )
