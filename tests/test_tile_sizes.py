"""Tile sizes as data: the table, its limits, and right results whatever they are set to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastlora.backends import native
from tests.cases import DTYPES, Base, Case, exact_results, make_inputs, plain_results, run
from tests.conftest import poisoned_memory
from tests.tolerance import assert_close_to_exact

if native.build_info() is None:
    pytest.skip(str(native.unavailable_reason()), allow_module_level=True)

from fastlora import _C

ISAS = native.build_info()["cpu_isas"].split()
KIB, MIB = 1 << 10, 1 << 20


@contextmanager
def tile_sizes(**sizes: int) -> Iterator[None]:
    before = _C.tile_sizes()
    try:
        _C.set_tile_sizes(**sizes)
        yield
    finally:
        _C.set_tile_sizes(**before)


# Each takes another path than the defaults do: more tiles, shorter ones, or one for everything.
SIZES = {
    "no decoding": {"decode_tokens": 0},
    "one row a tile": {"decode_rows": 1, "fwd_strip_rows": 1, "bwd_token_block": 1},
    "odd rows": {"decode_rows": 7, "fwd_strip_rows": 13, "fwd_few_rows": 5, "bwd_token_block": 5},
    "smallest strips": {
        "fwd_pack_bytes": 1,
        "fwd_shrink_columns": 128,
        "fwd_strip_bytes": 128,
        "bwd_shrink_columns": 32,
        "bwd_panel_units": 8,
        "bwd_tokens": 3,
        "bwd_grad_tokens": 3,
        "bwd_few_tokens": 0,
    },
    "odd tokens": {
        "bwd_tokens": 37,
        "bwd_grad_tokens": 61,
        "bwd_panel_units": 24,
        "bwd_few_tokens": 4096,
    },
    "wide": {
        "decode_rows": 4096,
        "fwd_shrink_columns": 1024,
        "fwd_strip_rows": 200,
        "fwd_strip_bytes": 16384,
        "bwd_token_block": 1000,
        "bwd_strip_columns": 512,
        "bwd_shrink_columns": 4096,
    },
}

CASES = (
    Case("three tokens", 3, 70, 192, 8, dropout_p=0.05),
    Case("eight tokens, rows left over", 8, 133, 576, 16, bias=False),
    Case("one panel", 17, 33, 35, 3, dropout_p=0.1),
    Case("many tokens, odd N and K", 300, 101, 1131, 20, dropout_p=0.3),
)


@pytest.mark.parametrize("base", [Base(), Base("nf4", 64, nested=True)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_results_hold_for_all_sizes(sizes: str, case: Case, base: Base) -> None:
    for dtypes in ("fp32", "bf16, fp32 adapter", "fp16"):
        inputs = make_inputs(case, base, DTYPES[dtypes])
        exact, plain = exact_results(case, inputs), plain_results(case, inputs)
        with tile_sizes(**SIZES[sizes]), poisoned_memory():
            got = run(case, inputs, "native")
        for name, out in got.items():
            want, base_result = getattr(exact, name), getattr(plain, name)
            if base_result is None:
                base_result = want.to(out.dtype)
            assert_close_to_exact(out, want, base_result, what=f"{name}, {dtypes}")


def test_sizes_reach_the_kernels() -> None:
    """Sums of another length round otherwise: the proof that a setting is not just stored."""
    case = Case("", M=70, N=64, K=1000, R=4)
    inputs = make_inputs(case, Base(), DTYPES["fp32"])
    before = run(case, inputs, "native")
    with tile_sizes(fwd_strip_bytes=128, bwd_panel_units=8, bwd_grad_tokens=1):
        other = run(case, inputs, "native")
    for name in ("y", "dx", "dA"):
        assert not torch.equal(getattr(before, name), getattr(other, name)), name
    again = run(case, inputs, "native")
    assert all(torch.equal(out, getattr(again, name)) for name, out in before.items())


def test_the_machines_sizes_come_from_the_table() -> None:
    caches = {"2": 0, "3": 0}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = (folder / "size").read_text().strip()
        caches[(folder / "level").read_text().strip()] = int(size[:-1]) * KIB
    isa = native.build_info()["cpu_isa"]
    assert _C.tile_sizes() == _C.default_tile_sizes(isa, caches["2"], caches["3"])


@pytest.mark.parametrize("isa", ISAS)
def test_sizes_follow_the_caches(isa: str) -> None:
    unknown = _C.default_tile_sizes(isa, 0, 0)
    assert unknown == _C.default_tile_sizes(isa, MIB, 32 * MIB)
    small = _C.default_tile_sizes(isa, 256 * KIB, 8 * MIB)
    large = _C.default_tile_sizes(isa, 2 * MIB, 64 * MIB)
    bound = ("fwd_pack_bytes", "fwd_strip_bytes", "bwd_tokens", "bwd_panel_units")
    for name, size in unknown.items():
        quarter, double = (size // 4, 2 * size) if name in bound else (size, size)
        assert (small[name], large[name]) == (quarter, double), name
    # What the table makes is what the kernels take, however odd the caches are.
    for l2 in (1, 48 * KIB, 512 * KIB, 1280 * KIB, 64 * MIB):
        with tile_sizes(**_C.default_tile_sizes(isa, l2, 3 * l2)):
            pass


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"decode_tokens": 9}, "decode_tokens must be a multiple of 1 from 0 to 8, got 9"),
        ({"fwd_shrink_columns": 64}, "fwd_shrink_columns must be a multiple of 128 from 128 to"),
        ({"bwd_strip_columns": 200}, "bwd_strip_columns must be a multiple of 128 from 128 to"),
        ({"fwd_strip_rows": 0}, "fwd_strip_rows must be a multiple of 1 from 1 to"),
        ({"strip": 1}, "no tile size has the name strip"),
    ],
)
def test_wrong_sizes_are_named(sizes: dict[str, int], message: str) -> None:
    before = _C.tile_sizes()
    with pytest.raises(ValueError, match=re.escape(message)):
        _C.set_tile_sizes(**sizes)
    assert _C.tile_sizes() == before


def test_a_size_that_is_no_int() -> None:
    with pytest.raises(TypeError, match="decode_rows must be an int"):
        _C.set_tile_sizes(decode_rows="8")
    with pytest.raises(ValueError, match="no tile sizes for instruction set avx3"):
        _C.default_tile_sizes("avx3", 0, 0)
