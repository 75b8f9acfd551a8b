"""Checks of the emulated CUDA kernels: for the tests, for planted faults, and under sanitizers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from fastlora import ops, reference
from fastlora.backends import native, schemas
from fastlora.quant import QuantState, dynamic_code, find_format, quantize_bounds
from fastlora.quant.absmax import quantize_absmax
from tests import emulated
from tests.cases import DTYPES, Base, Case, exact_results, make_inputs, plain_results, run
from tests.conftest import poisoned_memory
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


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[str]:
    emulated.load()
    with emulated.as_backend() as name:
        yield name


def check_against_definition(case: Case, base: Base, dtypes: str, backend: str) -> None:
    """Every result of one layer's op, held to the error policy."""
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


def check_quantize_and_dequantize(
    blocksize: int, quant_type: str, dtype: torch.dtype, backend: str
) -> None:
    """Both are bit exact, with nested absmax and without."""
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


def assert_same_nesting(absmax: torch.Tensor) -> None:
    shape = torch.Size((absmax.numel() * 64,))
    state = QuantState(absmax, shape, find_format("nf4").table(), torch.float32, 64, "nf4")
    with poisoned_memory():
        got = native.cuda.nested(state)
    want = reference.nested(state)
    assert torch.equal(got.absmax, want.absmax)
    for out, value in zip(got.tensors()[1:], want.tensors()[1:], strict=True):
        torch.testing.assert_close(out, value, rtol=0, atol=0, equal_nan=True)


def check_nested_absmax(blocks: int) -> None:
    """Absmax of several magnitudes, and equal ones."""
    for magnitude in (1.0, 3e-39, 1e-44, 1e30):
        assert_same_nesting(torch.rand(blocks) * magnitude)
    assert_same_nesting(torch.full((blocks,), 0.25))  # all differences are zero


def check_nested_codes() -> None:
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


def check_scale_that_is_not_finite(M: int, N: int, K: int, odd: float, backend: str) -> None:
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


def check_infinite_operands(M: int, backend: str) -> None:
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
    absmax, code = torch.rand(5000), find_format("nf4").table()
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
