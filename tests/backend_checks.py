"""What every backend of a layer's op must pass, run by a module with a `backend` of its own."""

from __future__ import annotations

import pytest
import torch

from fastlora import ops, reference
from fastlora.layer import Layer, Needs
from tests.cases import DTYPES, Base, Case, exact_results, make_inputs, plain_results, run
from tests.conftest import poisoned_memory
from tests.tolerance import assert_close_to_exact


def check_against_definition(case: Case, base: Base, dtypes: str, backend: str) -> None:
    """Every result of one layer's op: its dtype, and the error policy."""
    case = base.fit(case)
    inputs = make_inputs(case, base, DTYPES[dtypes])
    exact, plain = exact_results(case, inputs), plain_results(case, inputs)
    with poisoned_memory():
        got = run(case, inputs, backend)
    adapter_dtype = inputs.lora_A.dtype
    expected_dtypes = (inputs.x.dtype, inputs.x.dtype, adapter_dtype, adapter_dtype, torch.float32)
    for (name, out), dtype in zip(got.items(), expected_dtypes, strict=True):
        want, base_result = getattr(exact, name), getattr(plain, name)
        assert out.dtype == dtype, name
        if base_result is None:  # no bias in this case: compare with the exact sum alone
            base_result = want.to(dtype)
        assert_close_to_exact(out, want, base_result, what=name)


@pytest.mark.parametrize("asked", range(16))
def test_computes_only_what_is_needed(asked: int, backend: str) -> None:
    needs = Needs(*(bool(asked >> i & 1) for i in range(4)))
    case = Case("", M=21, N=40, K=100, R=4, dropout_p=0.2)
    for base in (Base(), Base("nf4", 64, nested=True)):
        inputs = make_inputs(case, base, DTYPES["bf16, fp32 adapter"])
        everything, some = run(case, inputs, backend), run(case, inputs, backend, needs)
        names = ("dx", "dA", "dB", "dbias")
        for name, need in zip(names, needs, strict=True):
            got = getattr(some, name)
            if not need:
                assert got is None, name
            else:
                assert torch.equal(got, getattr(everything, name)), name


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_dropout_mask_is_the_references(p: float, backend: str) -> None:
    """With A = B = identity and W = 0, y is drop(x): its zeros are the mask's."""
    M, K = 37, 300
    x, eye = torch.ones(M, K), torch.eye(K)
    seed = torch.tensor([-12345])
    mask = reference.dropout_mask(M, K, p, seed)
    layer = Layer(torch.zeros(K, K), eye, eye, 1.0, dropout_p=p, seed=seed)
    y, S = ops.lora_linear_fwd(x, layer, backend=backend)
    assert torch.equal(y != 0, mask)
    # y = dx for dy = 1: the backward makes the same mask, along the other axis.
    dx, *_ = ops.lora_linear_bwd(x, x, layer, S, backend=backend)
    assert torch.equal(dx != 0, mask)
    few, _ = ops.lora_linear_fwd(x[:5], layer, backend=backend)
    assert torch.equal(few != 0, mask[:5])


@pytest.mark.parametrize(("N", "K"), [(0, 64), (5, 0), (0, 0)])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("M", [0, 3, 20])
def test_a_weight_without_elements(N: int, K: int, quantised: bool, M: int, backend: str) -> None:
    base = Base("nf4", 64) if quantised else Base()
    inputs = make_inputs(Case("", M, N, max(K, 1), R=2), base, DTYPES["fp32"])
    if K == 0:
        inputs.x, inputs.lora_A = torch.randn(M, 0), torch.randn(2, 0)
        inputs.weight = inputs.weight[:0] if quantised else torch.randn(N, 0)
        if quantised:
            inputs.weight, inputs.quant_state = reference.quantize_4bit(torch.empty(N, 0))
    got = run(Case("", M, N, K, R=2), inputs, backend)
    # Without columns y is the bias; without rows there is no y, and no gradient.
    assert torch.equal(got.y, inputs.bias.expand(M, N))
    assert torch.equal(got.dx, torch.zeros(M, K)) and torch.equal(got.dA, torch.zeros(2, K))
    assert torch.equal(got.dB, torch.zeros(N, 2))
    torch.testing.assert_close(got.dbias, inputs.dy.sum(0))


@pytest.mark.parametrize("rank", [0])
def test_no_adapter_is_the_frozen_layer(rank: int, backend: str) -> None:
    case = Case("", M=40, N=50, K=96, R=1)
    inputs = make_inputs(case, Base("nf4", 64), DTYPES["fp32"])
    inputs.lora_A, inputs.lora_B = torch.empty(rank, 96), torch.empty(50, rank)
    got = run(case, inputs, backend, Needs(True, False, False))
    W, plain = inputs.exact_weight(), plain_results(case, inputs)
    want = inputs.x.double() @ W.T + inputs.bias.double()
    assert_close_to_exact(got.y, want, plain.y, what="y")
    assert_close_to_exact(got.dx, inputs.dy.double() @ W, plain.dx, what="dx")


def test_dequantize_writes_into_out(backend: str) -> None:
    packed, state = reference.quantize_4bit(torch.randn(40, 96), compress_statistics=True)
    out = torch.full((40, 96), torch.nan, dtype=torch.bfloat16)
    assert ops.dequantize_4bit(packed, state, out=out, backend=backend) is out
    assert torch.equal(out, reference.dequantize_4bit(packed, state, torch.bfloat16))


def test_code_table_comes_from_the_state(backend: str) -> None:
    """No backend may carry its own NF4 table: another code gives another weight."""
    case = Case("", M=4, N=32, K=64, R=2)
    inputs = make_inputs(case, Base("nf4", 64), DTYPES["fp32"])
    before = run(case, inputs, backend)
    inputs.quant_state.code = inputs.quant_state.code.flip(0).contiguous()
    after, exact = run(case, inputs, backend), exact_results(case, inputs)
    assert not torch.allclose(before.y, after.y)
    assert_close_to_exact(after.y, exact.y, plain_results(case, inputs).y, what="y")
