"""The CUDA side of the native backend, its kernels emulated, against the definition."""

from __future__ import annotations

import pytest
import torch

from fastlora import ops, reference
from fastlora.backends import native, triton
from fastlora.backends.contract import Request
from fastlora.layer import Layer, Needs
from tests import cuda_checks, emulated
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
from tests.cuda_checks import (
    EDGES,
    LORA_TERM_ERROR,
    NESTED,
    assert_same_nesting,
    check_against_definition,
    check_infinite_operands,
    check_nested_absmax,
    check_nested_codes,
    check_quantize_and_dequantize,
    check_scale_that_is_not_finite,
    lora_term_errors,
)
from tests.tolerance import assert_close_to_exact

RUNS = [
    (case, base, dtypes)
    for case in EDGES + CASES
    for base in FOUR_BIT
    for dtypes in DTYPES
    # Every dtype with one base, every base with one dtype.
    if base == NESTED or dtypes == "bf16, fp32 adapter"
]

backend = cuda_checks.backend


@pytest.mark.skipif(triton.unavailable_reason() is not None, reason="Triton is not installed")
@pytest.mark.parametrize("case", EDGES[:4], ids=str)
@pytest.mark.parametrize("decoded_first", [False, True])
def test_with_the_skinny_products_of_triton(
    case: Case, decoded_first: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := triton.unsupported(Request("lora_linear_fwd", "cpu")):
        pytest.skip(reason)
    calls = []
    monkeypatch.setattr(native.cuda, "skinny", lambda device: calls.append(device) or triton.TRITON)
    if decoded_first:
        monkeypatch.setattr(native.cuda, "fused_tokens", lambda device: 0)
    test_against_definition(case, NESTED, "bf16, fp32 adapter", backend)
    assert calls


@pytest.mark.parametrize(
    ("case", "base", "dtypes"), RUNS, ids=lambda part: str(part).replace(" ", "_")
)
def test_against_definition(case: Case, base: Base, dtypes: str, backend: str) -> None:
    check_against_definition(case, base, dtypes, backend)


@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_and_dequantize_are_bit_exact(
    blocksize: int, quant_type: str, dtype: torch.dtype, backend: str
) -> None:
    check_quantize_and_dequantize(blocksize, quant_type, dtype, backend)


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


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 5000])
def test_nested_absmax_is_bit_exact(blocks: int, backend: str) -> None:
    check_nested_absmax(blocks)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_nested_absmax_that_is_not_finite(odd: float, backend: str) -> None:
    absmax = torch.rand(600)
    absmax[300] = odd
    assert_same_nesting(absmax)


def test_nested_codes_change_where_the_definition_changes_them(backend: str) -> None:
    check_nested_codes()


def test_lora_term_keeps_fp32_adapters(backend: str) -> None:
    assert max(lora_term_errors(backend)) < LORA_TERM_ERROR


def test_code_table_comes_from_the_state(backend: str) -> None:
    for M in (4, 70):
        case = Case("", M, N=32, K=64, R=2)
        inputs = make_inputs(case, Base("nf4", 64), DTYPES["bf16"])
        before = run(case, inputs, backend)
        inputs.quant_state.code = inputs.quant_state.code.flip(0).contiguous()
        after, exact = run(case, inputs, backend), exact_results(case, inputs)
        assert not torch.allclose(before.y, after.y)
        assert_close_to_exact(after.y, exact.y, plain_results(case, inputs).y, what="y")


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


# ---- not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [3, 70])
@pytest.mark.parametrize(("N", "K"), [(70, 160), (8, 96), (130, 64), (70, 145), (9, 45)])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_a_scale_that_is_not_finite_stays_where_it_is(
    M: int, N: int, K: int, odd: float, backend: str
) -> None:
    check_scale_that_is_not_finite(M, N, K, odd, backend)


@pytest.mark.parametrize("M", [3, 70])
def test_infinite_fp32_operands_stay_infinite(M: int, backend: str) -> None:
    check_infinite_operands(M, backend)
