"""The CUDA side of the native backend, its kernels emulated, against the definition."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastlora import backends, lora_linear, ops, reference
from fastlora.backends import native, schemas, triton
from fastlora.backends.contract import Request
from fastlora.backends.machine import tuned
from fastlora.layer import Layer, Needs
from fastlora.quant import QuantState, code_table, dynamic_code, quantize_bounds
from fastlora.quant.absmax import quantize_absmax
from tests import emulated
from tests.cases import (
    CASES,
    DTYPES,
    FOUR_BIT,
    Base,
    Case,
    exact_results,
    make_inputs,
    plain_results,
    run,
)
from tests.conftest import poisoned_memory
from tests.csrc import cuda_gates
from tests.tolerance import assert_close_to_exact

NESTED = Base("nf4", 64, nested=True)
# A tile is 128 tokens by 128 outputs and a step 64 terms, of which a thread decodes 32; LoRA takes
# 32 ranks at once. Sums are split to keep 12 multiprocessors busy. Decoding takes 8 tokens at a
# time, up to 32 in a block, and 16 rows of W.
EDGES = (
    Case("whole tiles and ranks", 128, 128, 128, 32, dropout_p=0.1),
    Case("one below each edge", 127, 127, 96, 31, dropout_p=0.1),
    Case("one past each edge", 129, 129, 160, 33, dropout_p=0.3),
    Case("half a step, few outputs", 65, 8, 32, 1, bias=False),
    Case("few tokens, no decoding: one of a wider row", 1, 40, 96, 4, strided=True),
    Case("ragged rows, one code past a run", 130, 131, 161, 33, dropout_p=0.1),
    Case("ragged rows, one code short of a tile", 67, 40, 127, 5, dropout_p=0.2),
    Case("ragged rows, few tokens and no whole run", 5, 9, 7, 2, dropout_p=0.1, strided=True),
    Case("ragged rows, one column", 70, 130, 1, 9, bias=False),
    Case("ragged rows, sum of the forward in two parts", 66, 20, 1090, 4, dropout_p=0.1),
    Case("ragged rows, sum of dx in two parts", 33, 1101, 50, 3, dropout_p=0.1),
    Case("sum of the forward in two parts", 70, 64, 1056, 5, dropout_p=0.1),
    Case("sum of dx in two parts", 66, 1100, 64, 3, dropout_p=0.2),
    Case("few tokens, no decoding: half a step", 7, 40, 96, 4, dropout_p=0.1, strided=True),
    Case("decoding: 9 tokens, 17 rows", 9, 17, 64, 5, dropout_p=0.1),
    Case("decoding: 17 tokens", 17, 16, 128, 4),
    Case("decoding: 33 tokens, two blocks' worth", 33, 31, 192, 9, dropout_p=0.1),
    Case("decoding: 64 tokens, parts of S and of the sum", 64, 33, 2112, 4, dropout_p=0.1),
    Case("everything dropped", 70, 32, 64, 4, dropout_p=1.0),
)
RUNS = [
    (case, base, dtypes)
    for case in EDGES + CASES
    for base in FOUR_BIT
    for dtypes in DTYPES
    # Every dtype with one base, every base with one dtype.
    if base == NESTED or dtypes == "bf16, fp32 adapter"
]


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[str]:
    emulated.load()
    with emulated.as_backend() as name:
        yield name


@pytest.mark.skipif(triton.unavailable_reason() is not None, reason="Triton is not installed")
@pytest.mark.parametrize("case", EDGES[:4], ids=str)
@pytest.mark.parametrize("decoded_first", [False, True])
def test_with_the_skinny_products_of_triton(
    case: Case, decoded_first: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := triton.unsupported(Request("lora_linear_fwd", "cpu")):
        pytest.skip(reason)
    calls = []
    monkeypatch.setattr(native.cuda, "skinny", lambda device: calls.append(device) or triton)
    if decoded_first:
        monkeypatch.setattr(native.cuda, "fused_tokens", lambda device: 0)
    test_against_definition(case, NESTED, "bf16, fp32 adapter", backend)
    assert calls


@pytest.mark.parametrize(
    ("case", "base", "dtypes"), RUNS, ids=lambda part: str(part).replace(" ", "_")
)
def test_against_definition(case: Case, base: Base, dtypes: str, backend: str) -> None:
    case = base.fit(case)
    inputs = make_inputs(case, base, DTYPES[dtypes])
    exact, plain = exact_results(case, inputs), plain_results(case, inputs)
    with poisoned_memory():
        got = run(case, inputs, backend)
    for name, out in got.items():
        want, base_result = getattr(exact, name), getattr(plain, name)
        if base_result is None:  # no bias in this case: compare with the exact sum alone
            base_result = want.to(out.dtype)
        assert_close_to_exact(out, want, base_result, what=name)


@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_and_dequantize_are_bit_exact(
    blocksize: int, quant_type: str, dtype: torch.dtype, backend: str
) -> None:
    for shape in ((7, 33), (64, 128), (1, 1), (130, 577)):
        weight = torch.randn(shape).to(dtype)
        weight.view(-1)[:: max(1, weight.numel() // 5)] *= 1e-30  # some tiny, some denormal
        weight.view(-1)[-blocksize:] *= 0  # a block of zeros
        for nested in (False, True):
            packed, state = ops.quantize_4bit(
                weight, blocksize, quant_type, nested, backend=backend
            )
            want, want_state = reference.quantize_4bit(weight, blocksize, quant_type, nested)
            assert torch.equal(packed, want)
            for got, value in zip(state.tensors(), want_state.tensors(), strict=True):
                assert (got is None) == (value is None)
                assert got is None or (torch.equal(got, value) and got.dtype == value.dtype)
            for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
                with poisoned_memory():
                    out = ops.dequantize_4bit(packed, state, out_dtype, backend=backend)
                assert torch.equal(out, reference.dequantize_4bit(want, want_state, out_dtype))


def test_quantize_takes_what_is_not_aligned_and_not_a_number(backend: str) -> None:
    weight = torch.randn(1 + 64 * 9)[1:]
    packed, state = ops.quantize_4bit(weight, backend=backend)
    want, want_state = reference.quantize_4bit(weight)
    assert torch.equal(packed, want) and torch.equal(state.absmax, want_state.absmax)
    out = torch.full((1 + 64 * 9,), torch.nan)[1:]
    ops.dequantize_4bit(packed, state, out=out, backend=backend)
    assert torch.equal(out, reference.dequantize_4bit(want, want_state))
    weight[70] = torch.nan
    packed, state = ops.quantize_4bit(weight, backend=backend)
    want, want_state = reference.quantize_4bit(weight)
    assert torch.equal(packed, want) and bool(state.absmax[1].isnan())


def _assert_same_nesting(absmax: torch.Tensor) -> None:
    shape = torch.Size((absmax.numel() * 64,))
    state = QuantState(absmax, shape, code_table("nf4"), torch.float32, 64, "nf4")
    with poisoned_memory():
        got = native.cuda.nested(state)
    want = reference.nested(state)
    assert torch.equal(got.absmax, want.absmax)
    for out, value in zip(got.tensors()[1:], want.tensors()[1:], strict=True):
        torch.testing.assert_close(out, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 5000])
def test_nested_absmax_is_bit_exact(blocks: int, backend: str) -> None:
    for magnitude in (1.0, 3e-39, 1e-44, 1e30):
        _assert_same_nesting(torch.rand(blocks) * magnitude)
    _assert_same_nesting(torch.full((blocks,), 0.25))  # all differences are zero


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_nested_absmax_that_is_not_finite(odd: float, backend: str) -> None:
    absmax = torch.rand(600)
    absmax[300] = odd
    _assert_same_nesting(absmax)


def test_nested_codes_change_where_the_definition_changes_them(backend: str) -> None:
    """Values on both sides of every edge between two codes, a scale of 1 in each block."""
    code = dynamic_code()
    edges = (code[:-1] + code[1:]) * 0.5
    grid = torch.arange(-3, 4) / 65535.0
    values = (edges[:, None] + grid).reshape(-1)
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 254)).view(-1, 254)
    ends = torch.tensor([1.0, -1.0]).expand(len(blocks), 2)
    values = torch.cat([blocks, ends], dim=1).reshape(-1)
    zero = torch.zeros(1)
    codes, scales = native.cuda.ops.quantize_absmax(values, zero, code)
    want, state2 = quantize_absmax(values)
    assert torch.equal(codes, want) and torch.equal(scales, state2.absmax)
    # The codes nearest to zero lie between two points of the grid: bitsandbytes never takes them.
    assert codes.unique().numel() == 249


# The product of two split numbers leaves out that of their lower parts, up to 2^-16 of it. PEFT's
# own fp32 sequence is no measure for that, so this bound stands apart from the error policy.
LORA_TERM_ERROR = 2.0**-15


def lora_term_errors(backend: str) -> list[float]:
    """Of y and dx in fp32, relative to the largest, where W = 0 leaves the LoRA term alone."""
    inputs = make_inputs(Case("", 70, 96, 64, 40), Base("nf4"), DTYPES["fp32 computed in bf16"])
    inputs.weight, inputs.quant_state = reference.quantize_4bit(torch.zeros(96, 64))
    inputs.bias = None
    case = Case("", 70, 96, 64, 40, bias=False)
    got, exact = run(case, inputs, backend), exact_results(case, inputs)
    pairs = ((got.y, exact.y), (got.dx, exact.dx))
    return [float((out - want).abs().max() / want.abs().max()) for out, want in pairs]


def test_lora_term_keeps_fp32_adapters(backend: str) -> None:
    assert max(lora_term_errors(backend)) < LORA_TERM_ERROR


def test_any_schedule_gives_the_same_bits(backend: str) -> None:
    """Blocks and warps take their turns in another order each time."""
    library = emulated.load()
    for M, K in ((20, 1024), (130, 1056), (70, 1059)):
        case = Case("", M, N=200, K=K, R=20, dropout_p=0.1)
        inputs = make_inputs(case, NESTED, DTYPES["bf16, fp32 adapter"])
        first = run(case, inputs, backend)
        for seed in range(3):
            library.simt_seed(seed)
            again = run(case, inputs, backend)
            for name, tensor in first.items():
                assert torch.equal(tensor, getattr(again, name)), name


@pytest.mark.parametrize(
    ("sm", "blocks_at_once"), [(80, 2), (86, 1), (89, 1), (90, 2), (100, 2), (120, 1)]
)
@pytest.mark.parametrize(
    ("M", "K", "kernels"),
    [
        (70, 2112, "qlora_gemm_(fwd|dx)_.*"),
        (70, 2113, "qlora_gemm_ragged_.*_128_.*"),
        (60, 2113, "qlora_gemm_ragged_.*_64_.*"),
    ],
)
def test_sums_are_cut_for_every_place_of_a_gpu(
    sm: int, blocks_at_once: int, M: int, K: int, kernels: str, backend: str
) -> None:
    """Six multiprocessors, each with memory and registers for one block or for two; three tiles."""
    if "128" in kernels:
        blocks_at_once = 1
    library, parts = emulated.load(), 2 * blocks_at_once
    case = Case("", M, N=384, K=K, R=4)
    inputs = make_inputs(case, NESTED, DTYPES["bf16"])
    quant = schemas.packed(inputs.weight, inputs.quant_state)
    S = reference.shrink(inputs.x, inputs.layer)
    options = (inputs.bias, S, inputs.lora_B, inputs.scaling, torch.bfloat16)
    library.simt_set_architecture(sm)
    before = library.simt_counters().blocks
    y = native.cuda.ops.qlora_gemm_fwd(inputs.x, *quant, *options)
    blocks = library.simt_counters().blocks - before
    library.simt_set_architecture(80)
    adding = -(-M // 8) * 2  # blocks of 8 tokens and 256 outputs add the parts
    assert blocks == 3 * parts + adding
    # As many have registers there: 65536 of a multiprocessor, for blocks of 256 threads.
    _, gates = cuda_gates.read_gates()
    compiled = [row for row in gates if re.fullmatch(f"sm_{sm}a?", row["arch"])]
    registers = [int(row["registers"]) for row in compiled if re.fullmatch(kernels, row["kernel"])]
    assert registers and max(registers) * 256 * blocks_at_once <= 65536
    plain = plain_results(case, inputs).y
    assert_close_to_exact(y, exact_results(case, inputs).y, plain, what="y")


@pytest.mark.parametrize("K", [160, 161])
def test_matrix_loads_meet_no_bank_twice(K: int, backend: str) -> None:
    case = Case("", M=130, N=136, K=K, R=20, dropout_p=0.1)
    inputs = make_inputs(case, NESTED, DTYPES["bf16"])
    before = emulated.load().simt_counters()
    run(case, inputs, backend)
    after = emulated.load().simt_counters()
    assert after.matrix_loads > before.matrix_loads
    assert after.bank_conflicts == before.bank_conflicts


# Turns that plain loads and stores of shared memory take on top, for each that they must take.
# qlora_gemm: the packed codes, where lanes 8 apart meet, and the parts of S and B. qlora_decode:
# the sums of two tokens. quantize_absmax: bisection, whose steps lie anywhere, as do nested codes.
PLAIN_CONFLICTS = {
    "quantize_4bit": 0.0,
    "quantize_absmax": 1.5,
    "dequantize_4bit": 0.03,
    "qlora_gemm_fwd": 0.21,
    "qlora_gemm_dx": 0.2,
    "qlora_decode": 0.15,
}


def plain_conflicts(
    library: ctypes.CDLL, M: int = 40, K: int = 512, nested: bool = True
) -> dict[str, tuple[int, int]]:
    """Turns on top, and turns without conflicts, of each kernel."""
    case, ops, counted = Case("", M, 128, K, 20, dropout_p=0.1), native.cuda.ops, {}
    inputs = make_inputs(case, Base("nf4", 64, nested), DTYPES["bf16"])
    A, B, S, dtype = inputs.lora_A, inputs.lora_B, torch.randn(M, 20), torch.bfloat16
    quant = schemas.packed(inputs.weight, inputs.quant_state)
    layer = inputs.layer._replace(bias=None, scaling=1.0)
    absmax, code = torch.rand(5000), code_table("nf4")
    bounds, order = quantize_bounds(code)
    calls = {
        "quantize_4bit": (torch.randn(128, K), bounds, order.to(torch.uint8), 64),
        "quantize_absmax": (absmax, absmax.mean(), dynamic_code()),
        "dequantize_4bit": (*quant, torch.empty(128, K)),
        "qlora_gemm_fwd": (inputs.x, *quant, None, S, B, 1.0, dtype),
        "qlora_gemm_dx": (inputs.dy, *quant, S, A, 0.1, inputs.seed, dtype),
        "qlora_decode": (inputs.x[:64], *schemas.flatten(layer)),
    }
    if K % 64 != 0:
        del calls["qlora_decode"]
    for kernel, arguments in calls.items():
        before = library.simt_counters()
        getattr(ops, {"dequantize_4bit": "dequantize_4bit_out"}.get(kernel, kernel))(*arguments)
        after = library.simt_counters()
        turns = after.plain_turns - before.plain_turns
        counted[kernel] = (after.plain_conflicts - before.plain_conflicts, turns)
    return counted


@pytest.mark.parametrize("K", [512, 499])
@pytest.mark.parametrize("M", [1, 9, 17, 40, 130])
def test_plain_accesses_seldom_meet_in_a_bank(M: int, K: int, backend: str) -> None:
    counted = plain_conflicts(emulated.load(), M, K)
    assert PLAIN_CONFLICTS.keys() - counted.keys() == ({"qlora_decode"} if K % 64 else set())
    for kernel, (conflicts, turns) in counted.items():
        assert turns > 0 and conflicts <= PLAIN_CONFLICTS[kernel] * turns, kernel


def test_main_loops_meet_in_banks_for_packed_codes_alone(backend: str) -> None:
    """A step of qlora_gemm reads the packed codes in eight turns a warp instead of four; the loop
    of qlora_decode never waits."""
    library = emulated.load()
    short, long = (plain_conflicts(library, 70, K, nested=False) for K in (512, 1024))
    more = {kernel: long[kernel][0] - short[kernel][0] for kernel in short}
    # The longer sum is cut into two parts: one block more decodes a first step before its loop.
    steps, warps = 512 // 64 + 1, 8
    assert more["qlora_gemm_fwd"] == steps * warps * 4
    assert more["qlora_decode"] == 0


def test_code_table_comes_from_the_state(backend: str) -> None:
    for M in (4, 70):
        case = Case("", M, N=32, K=64, R=2)
        inputs = make_inputs(case, Base("nf4", 64), DTYPES["bf16"])
        before = run(case, inputs, backend)
        inputs.quant_state.code = inputs.quant_state.code.flip(0).contiguous()
        after, exact = run(case, inputs, backend), exact_results(case, inputs)
        assert not torch.allclose(before.y, after.y)
        assert_close_to_exact(after.y, exact.y, plain_results(case, inputs).y, what="y")


# ---- not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [3, 70])
@pytest.mark.parametrize(("N", "K"), [(70, 160), (8, 96), (130, 64), (70, 145), (9, 45)])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_a_scale_that_is_not_finite_stays_where_it_is(
    M: int, N: int, K: int, odd: float, backend: str
) -> None:
    """Past the end of a sum W is times zero: no scale of another place may come in there."""
    case = Case("", M, N, K, R=4)
    for block in (0, N * K // 32 // 2, -1):
        inputs = make_inputs(case, Base("nf4", 32), DTYPES["bf16, fp32 adapter"])
        inputs.quant_state.absmax[block] = odd
        got, exact = run(case, inputs, backend), exact_results(case, inputs)
        for name in ("y", "dx"):
            bad = ~getattr(exact, name).isfinite()
            assert bad.any() and not bad.all()
            assert torch.equal(~getattr(got, name).isfinite(), bad), name


@pytest.mark.parametrize("M", [3, 70])
def test_infinite_fp32_operands_stay_infinite(M: int, backend: str) -> None:
    """S B^T and dS A of numbers in two parts: inf keeps its sign, and 0 or -inf makes NaN of it."""
    N, K, R = 40, 64, 6
    inf, nan = torch.inf, torch.nan
    inputs = make_inputs(Case("", M, N, K, R), Base("nf4", 32), DTYPES["bf16, fp32 adapter"])
    quant = schemas.packed(inputs.weight, inputs.quant_state)
    weight = inputs.exact_weight()
    S, A, B = torch.randn(M, R), inputs.lora_A, inputs.lora_B
    S[0, 0], S[1, 1], S[2, 2:4] = inf, -inf, torch.tensor([inf, -inf])
    for adapter in (A, B.T):  # [R, outputs]
        adapter[0, 3], adapter[0, 5], adapter[1, 7], adapter[4, 9], adapter[5, 11] = (
            0.0, 0.5, inf, -inf, nan,
        )  # fmt: skip
    y = native.cuda.ops.qlora_gemm_fwd(inputs.x, *quant, None, S, B, 1.0, torch.float32)
    dx = native.cuda.ops.qlora_gemm_dx(inputs.dy, *quant, S, A, 0.0, None, torch.float32)
    for got, x, W, adapter in ((y, inputs.x, weight.T, B.T), (dx, inputs.dy, weight, A)):
        want = (x.double() @ W + S.double() @ adapter.double()).float()
        assert want.isnan().any() and (want == inf).any() and (want == -inf).any()
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got[want.isinf()], want[want.isinf()])
        assert torch.equal(got.isfinite(), want.isfinite())


# ---- bindings ----------------------------------------------------------------------------------


def _op_arguments() -> dict[str, tuple]:
    case = Case("", M=5, N=12, K=64, R=2, dropout_p=0.1)
    inputs = make_inputs(case, NESTED, DTYPES["bf16, fp32 adapter"])
    quant = schemas.packed(inputs.weight.view(-1), inputs.quant_state)
    A, B, S, dtype = inputs.lora_A, inputs.lora_B, torch.randn(5, 2), torch.bfloat16
    layer, absmax = inputs.layer._replace(weight=quant.data, scaling=1.0), torch.rand(300)
    return {
        "quantize_absmax": (absmax, absmax.mean(), dynamic_code()),
        "qlora_gemm_fwd": (inputs.x, *quant, inputs.bias, S, B, 1.0, dtype),
        "qlora_gemm_dx": (inputs.dy, *quant, S, A, 0.1, inputs.seed, dtype),
        "qlora_decode": (inputs.x, *schemas.flatten(layer)),
    }


@pytest.mark.parametrize("op", _op_arguments())
def test_opcheck(op: str) -> None:
    result = torch.library.opcheck(
        getattr(torch.ops.fastlora_emulated, op).default,
        _op_arguments()[op],
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("op", "place", "wrong", "message"),
    [
        ("quantize_absmax", 0, torch.rand(8).double(), "absmax has the wrong dtype"),
        ("quantize_absmax", 1, torch.rand(2), "offset must be contiguous with 1 elements, got 2"),
        ("quantize_absmax", 2, torch.rand(16), "code must be contiguous with 256 elements, got 16"),
        ("qlora_gemm_fwd", 0, torch.randn(5, 64), "x must be bf16 or fp16"),
        ("qlora_gemm_fwd", 1, torch.zeros(3, dtype=torch.uint8), "weight must be contiguous with"),
        ("qlora_gemm_fwd", 9, torch.randn(4, 2), "S must be .5, 2."),
        ("qlora_gemm_dx", 11, None, "seed must be an int64 tensor"),
        ("qlora_decode", 7, 32, "K and blocksize must be multiples of 64"),
        ("qlora_decode", 10, torch.randn(3, 64), "lora_B must be .12, 3."),
        ("qlora_decode", 11, torch.empty(2**31, 0), "weight must have fewer than 2.38 elements"),
    ],
)
def test_bindings_refuse(op: str, place: int, wrong: object, message: str) -> None:
    arguments = list(_op_arguments()[op])
    arguments[place] = wrong
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fastlora_emulated, op)(*arguments)


def test_decode_tokens_is_the_kernels() -> None:
    arguments = list(_op_arguments()["qlora_decode"])
    most = native.cuda.DECODE_TOKENS
    arguments[0] = torch.randn(most, 64).bfloat16()
    assert torch.ops.fastlora_emulated.qlora_decode(*arguments)[0].shape == (most, 12)
    arguments[0] = torch.randn(most + 1, 64).bfloat16()
    with pytest.raises(RuntimeError, match=f"x must have at most {most} rows"):
        torch.ops.fastlora_emulated.qlora_decode(*arguments)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_the_decode_op_takes_a_whole_layer(
    compute_dtype: torch.dtype | None, nested: bool, bias: bool, backend: str
) -> None:
    case = Case("", M=9, N=33, K=192, R=5, dropout_p=0.1, bias=bias)
    dtypes = (torch.bfloat16, torch.float32, compute_dtype)
    inputs = make_inputs(case, Base("nf4", 64, nested), dtypes)
    with poisoned_memory():
        y, S = native.cuda.ops.qlora_decode(inputs.x, *schemas.flatten(inputs.layer))
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert_close_to_exact(y, exact_results(case, inputs).y, plain_results(case, inputs).y, what="y")
    plain = reference.plain.shrink(inputs.x, inputs.layer)
    wide = reference.plain.widened(inputs.layer)
    assert_close_to_exact(S, reference.plain.shrink(inputs.x.double(), wide), plain, what="S")


@pytest.mark.parametrize(("N", "K"), [(0, 64), (5, 0), (0, 0)])
@pytest.mark.parametrize("M", [0, 3, 70])
def test_a_weight_without_elements(N: int, K: int, M: int, backend: str) -> None:
    """No kernel runs."""
    weight, state = reference.quantize_4bit(torch.empty(N, K))
    x, dy, bias = torch.randn(M, K), torch.randn(M, N), torch.randn(N)
    layer = Layer(weight, torch.randn(2, K), torch.randn(N, 2), 1.0, bias, state)
    emulated.called.clear()
    y, S = ops.lora_linear_fwd(x, layer, backend=backend)
    grads = ops.lora_linear_bwd(dy, x, layer, S, Needs(bias=True), backend=backend)
    assert emulated.called == []
    assert torch.equal(y, bias.expand(M, N))
    assert torch.equal(grads.x, torch.zeros(M, K)) and torch.equal(grads.A, torch.zeros(2, K))
    assert torch.equal(grads.B, torch.zeros(N, 2))
    torch.testing.assert_close(grads.bias, dy.sum(0))


# ---- which kernel ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("M", "K", "blocksize", "dtype", "kernel"),
    [
        (1, 4096, 64, torch.bfloat16, "decode"),
        (64, 4096, 64, torch.float16, "decode"),
        (65, 4096, 64, torch.bfloat16, "gemm"),
        (1, 4096, 32, torch.bfloat16, "gemm"),
        (1, 4128, 64, torch.bfloat16, "gemm"),
        (512, 4096, 64, torch.bfloat16, "gemm"),
        (513, 4096, 64, torch.bfloat16, "dequantize"),
        (1, 4100, 64, torch.bfloat16, "gemm"),
        (513, 4100, 64, torch.bfloat16, "dequantize"),
        (1, 4096, 64, torch.float32, "dequantize"),
    ],
)
def test_plan(M: int, K: int, blocksize: int, dtype: torch.dtype, kernel: str) -> None:
    assert native.cuda.plan("lora_linear_fwd", M, K, blocksize, dtype, 512) == kernel
    backward = "gemm" if kernel == "decode" else kernel
    assert native.cuda.plan("lora_linear_bwd", M, K, blocksize, dtype, 512) == backward


@pytest.mark.parametrize("kept", ["gemm", "decode", None])
def test_what_was_tuned_goes_before_the_plan(
    kept: str | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def find(op: str, x: torch.Tensor, layer: Layer) -> tuned.Kept | None:
        asked.append((op, x.dtype, *layer.lora_B.shape))
        return None if kept is None else tuned.Kept(native.NAME, kept)

    monkeypatch.setattr(tuned, "kept", find)
    inputs = make_inputs(Case("", 9, 40, 64, 3), NESTED, DTYPES["bf16"])
    for blocksize, forward in ((64, kept or "decode"), (32, "gemm")):
        weight, state = reference.quantize_4bit(torch.randn(40, 64), blocksize)
        layer = Layer(weight, inputs.lora_A, inputs.lora_B, 1.0, quant_state=state)
        emulated.called.clear()
        _, S = native.cuda.lora_linear_fwd(inputs.x, layer)
        native.cuda.lora_linear_bwd(inputs.dy, inputs.x, layer, S, Needs())
        assert emulated.called == [
            "qlora_decode" if forward == "decode" else "qlora_gemm_fwd",
            "qlora_gemm_dx",
        ]
    assert [what[0] for what in asked] == ["lora_linear_fwd", "lora_linear_bwd"] * 2
    assert all(what[1:] == (torch.bfloat16, 40, 3) for what in asked)


def test_a_named_kernel_runs(backend: str) -> None:
    """As `fastlora tune` calls each of them, above the limit of tokens, too."""
    for M, kernel, op in (
        (5, "gemm", "gemm_fwd"),
        (5, "decode", "decode"),
        (600, "gemm", "gemm_fwd"),
    ):
        case = Case("", M, 40, 64, 3)
        inputs = make_inputs(case, NESTED, DTYPES["bf16"])
        emulated.called.clear()
        y, _ = native.cuda.lora_linear_fwd(inputs.x, inputs.layer, kernel=kernel)
        assert emulated.called == [f"qlora_{op}"]
        plain = plain_results(case, inputs).y
        assert_close_to_exact(y, exact_results(case, inputs).y, plain, what="y")


def test_fused_tokens_of_unlisted_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    find = _fused_tokens
    for capability, want in (((8, 0), 512), ((8, 7), 1024), ((12, 1), 1024), ((7, 5), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert find(torch.device("cuda")) == want


def test_the_choice_of_a_kernel_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def scaled(x: torch.Tensor) -> torch.Tensor:
        most = _fused_tokens(x.device)
        kernel = native.cuda.plan("lora_linear_fwd", *x.shape, 64, torch.bfloat16, most)
        return x * len(kernel)

    compiled = torch.compile(scaled, fullgraph=True, dynamic=True, backend="eager")
    for M in (8, 300, 900):
        x = torch.ones(M, 64)
        assert torch.equal(compiled(x), scaled(x))


@pytest.mark.parametrize("skinny", [(), ("triton",)], ids=str)
@pytest.mark.parametrize("M", [9, 70, 600])
def test_a_compiled_layer_gives_the_same_bits(
    M: int, skinny: tuple[str, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each of the kernels, with the products without W by the reference or by Triton."""
    if skinny and (reason := triton.unsupported(Request("lora_linear_fwd", "cpu"))):
        pytest.skip(reason)
    monkeypatch.setattr(native.cuda, "ops", torch.ops.fastlora_emulated)  # notes no calls
    monkeypatch.setattr(native.cuda, "_skinny", [backends.BACKENDS[name] for name in skinny])
    inputs = make_inputs(Case("", M, 40, 64, 3, dropout_p=0.1), NESTED, DTYPES["bf16"])
    x, A, B = (t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return lora_linear(
            x, inputs.weight, inputs.bias, A, B, 1.5, quant_state=inputs.quant_state,
            dropout_p=0.1, seed=inputs.seed, backend=backend,
        )  # fmt: skip

    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(x)
        results.append((y, *torch.autograd.grad(y, (x, A, B), inputs.dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


_fused_tokens = native.cuda.fused_tokens


def test_what_is_not_supported() -> None:
    four_bit = Request("lora_linear_fwd", "cuda", None, torch.bfloat16, four_bit=True)
    assert native.unsupported(four_bit) is None
    dense = native.unsupported(four_bit._replace(four_bit=False))
    assert dense == "lora_linear_fwd has no CUDA kernel in the native backend for dense weights."
    other = native.unsupported(four_bit._replace(op="dora_magnitude_fwd"))
    assert other == "dora_magnitude_fwd has no CUDA kernel in the native backend."
    wide = native.unsupported(four_bit._replace(dtype=torch.float64))
    assert wide == "lora_linear_fwd takes fp32, bf16 and fp16, got x in torch.float64."


def test_every_asm_stands_in_ptx() -> None:
    """The emulation replaces ptx.cuh, launch.cuh and cuda_stream.h: nothing else may need CUDA."""
    replaced = {"ptx.cuh", "launch.cuh", "cuda_stream.h"}
    for folder in ("cuda", "bindings"):
        for path in (emulated.ROOT / "csrc" / folder).iterdir():
            if path.name in replaced:
                continue
            found = re.findall(
                r"\basm\b|threadIdx|blockIdx|__sync\w+|__shfl\w+|__shared__|<<<|cuda_runtime",
                path.read_text(),
            )
            assert not found, f"{path}: {found}"


# ---- planted faults ----------------------------------------------------------------------------


@pytest.mark.slow
def test_every_planted_fault_is_noticed() -> None:
    command = [sys.executable, "-m", "tests.cuda_mutants"]
    done = subprocess.run(command, cwd=emulated.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("\nok ") >= 30 and "MISSED" not in done.stdout


def test_the_tables_of_the_document_are_those_of_the_gates_and_the_faults() -> None:
    from benchmarks.report import cuda_report
    from benchmarks.report.document import fill

    text = cuda_report.DOCS.read_text()
    assert fill(text, cuda_report.tables()) == text


# ---- the library for GPUs ----------------------------------------------------------------------

LOADS = """
import ctypes, torch, fastlora
torch.ops.load_library({library!r})
for op in (
    "quantize_4bit", "quantize_absmax", "dequantize_4bit_out",
    "qlora_gemm_fwd", "qlora_gemm_dx", "qlora_decode",
):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastlora::" + op, "CUDA"), op
library = ctypes.CDLL({library!r})
library.fastlora_cuda_fault.restype = ctypes.c_char_p
fault = library.fastlora_cuda_fault(0)
assert (fault == b"this torch has no CUDA") == (torch.version.cuda is None), fault
"""


@pytest.mark.slow
def test_the_gpu_library_loads_without_a_gpu() -> None:
    emulated.run_cmake("cuda-build")
    library = emulated.ROOT / "fastlora" / "_CUDA.so"
    if not library.exists():
        pytest.skip("no nvcc: fastlora/_CUDA.so has not been built")
    command = [sys.executable, "-c", LOADS.format(library=str(library))]
    done = subprocess.run(command, cwd=emulated.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


# ---- sanitizers --------------------------------------------------------------------------------

SANITIZED = """
import torch
from tests import emulated, test_cuda
from tests.cases import BASES, DTYPES

emulated.load_library({library!r})
torch.manual_seed(0)
with emulated.as_backend() as name:
    for i, case in enumerate(test_cuda.EDGES):
        test_cuda.test_against_definition(case, test_cuda.NESTED, "bf16, fp32 adapter", name)
        base = BASES[2 + i % (len(BASES) - 2)]
        for dtypes in ("fp16", "fp32 computed in bf16"):
            test_cuda.test_against_definition(case, base, dtypes, name)
    for blocksize, dtype in ((32, torch.float32), (64, torch.bfloat16), (4096, torch.float16)):
        test_cuda.test_quantize_and_dequantize_are_bit_exact(blocksize, "nf4", dtype, name)
    test_cuda.test_nested_absmax_is_bit_exact(257, name)
print("clean")
"""


@pytest.mark.slow
def test_under_address_and_undefined_behaviour_sanitizers() -> None:
    """Tensors come from malloc, so a read past the end of any of them is seen."""
    library = emulated.build("fastlora_emulated_sanitized")
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    assert all(Path(path.strip()).is_absolute() for path in runtime), runtime
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED.format(library=str(library))],
        cwd=emulated.ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(emulated.ROOT),
            "LD_PRELOAD": " ".join(path.strip() for path in runtime),
            "ASAN_OPTIONS": "detect_leaks=0",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "clean\n", done.stderr[-4000:]
