"""Every backend's ops against the definition, for every case, base and dtype."""

from __future__ import annotations

import pytest
import torch

from fastlora import backends, ops, reference
from fastlora.backends import native
from fastlora.backends.contract import Request
from fastlora.backends.schemas import flatten, flatten_all, packed
from fastlora.layer import Layer, Needs
from tests.cases import (
    BASES,
    CASES,
    DTYPES,
    Base,
    Case,
    Inputs,
    Results,
    exact_results,
    make_inputs,
    plain_results,
)
from tests.conftest import poisoned_memory
from tests.tolerance import assert_close_to_exact

DENSE, NF4 = Base(), Base("nf4", 64, nested=True)
EVERYTHING = Needs(bias=True)
CALL = Request("lora_linear_fwd", "cpu")


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.BACKENDS[request.param].unsupported(CALL):
        pytest.skip(reason)
    return request.param


def run(case: Case, inputs: Inputs, backend: str, needs: Needs = EVERYTHING) -> Results:
    layer = inputs.layer._replace(dropout_p=case.dropout_p)
    y, S = ops.lora_linear_fwd(inputs.x, layer, backend=backend)
    grads = ops.lora_linear_bwd(inputs.dy, inputs.x, layer, S, needs, backend=backend)
    return Results(y, *grads)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_definition(case: Case, base: Base, dtypes: str, backend: str) -> None:
    if base.quant_type is None and DTYPES[dtypes][2] is not None:
        pytest.skip("a dense weight has no compute dtype of its own")
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


def test_same_call_same_bits(backend: str) -> None:
    """Threads take tiles in any order; the result must not depend on it."""
    case = Case("", M=200, N=300, K=700, R=16, dropout_p=0.1)
    inputs = make_inputs(case, Base("nf4", 64, nested=True), DTYPES["bf16, fp32 adapter"])
    first = run(case, inputs, backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(case, inputs, backend)
            for name, tensor in first.items():
                # The reference sums as torch does, which depends on the number of threads.
                if backend != "reference" or count == threads:
                    assert torch.equal(tensor, getattr(again, name)), (name, count)
    finally:
        torch.set_num_threads(threads)


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


def test_default_device_does_not_leak_in(backend: str) -> None:
    weight = torch.randn(8, 64)
    want, state = reference.quantize_4bit(weight, compress_statistics=True)
    decoded = reference.dequantize_4bit(want, state)
    with torch.device("meta"):
        packed, got = ops.quantize_4bit(weight, compress_statistics=True, backend=backend)
        assert torch.equal(ops.dequantize_4bit(packed, got, backend=backend), decoded)
    assert torch.equal(packed, want)
    assert all(torch.equal(a, b) for a, b in zip(got.tensors(), state.tensors(), strict=True))


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


@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_and_dequantize_are_bit_exact(
    blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype, backend: str
) -> None:
    for shape in ((7, 33), (64, 128), (1, 1), (130, 577), (3, 1, 5)):
        weight = torch.randn(shape).to(dtype)
        weight.view(-1)[:: max(1, weight.numel() // 5)] *= 1e-30  # some tiny, some denormal
        packed, state = ops.quantize_4bit(weight, blocksize, quant_type, nested, backend=backend)
        want, want_state = reference.quantize_4bit(weight, blocksize, quant_type, nested)
        assert torch.equal(packed, want)
        for ours, theirs in zip(state.tensors(), want_state.tensors(), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
        for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
            with poisoned_memory():
                out = ops.dequantize_4bit(packed, state, out_dtype, backend=backend)
            assert out.shape == shape
            assert torch.equal(out, reference.dequantize_4bit(want, want_state, out_dtype))


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


def _op_arguments(base: Base = DENSE) -> dict[str, tuple]:
    case = Case("", M=5, N=12, K=64, R=2, dropout_p=0.1)
    inputs = make_inputs(case, base, DTYPES["fp32"])
    x, dy, S, needs = inputs.x, inputs.dy, torch.randn(5, 2), (True, True, False, True)
    layer = inputs.layer
    if base.quant_type is not None:
        layer = layer._replace(weight=layer.weight.view(-1), compute_dtype=torch.float32)
    two = flatten_all([layer, layer._replace(scaling=2.0, dropout_p=0.0)])
    weight = torch.randn(12, 64)
    bounds, order = torch.linspace(-0.9, 0.9, 15), torch.arange(16, dtype=torch.uint8)
    stored, state = reference.quantize_4bit(weight, compress_statistics=True)
    return {
        "lora_linear_fwd": (x, *flatten(layer)),
        "lora_linear_bwd": (dy, x, *flatten(layer), S, *needs),
        "shared_linear_fwd": (x, *two),
        "shared_linear_bwd": ([dy, dy], x, *two, [S, S], True, [1, 1, 0, 1, 0, 1]),
        "quantize_4bit": (weight, bounds, order, 64),
        "dequantize_4bit_out": (*packed(stored.view(-1), state), torch.empty(12, 64)),
    }


def test_decoding_compiles(backend: str) -> None:
    packed, state = reference.quantize_4bit(torch.randn(12, 64), 64, "nf4", True)

    def decoded(packed: torch.Tensor) -> torch.Tensor:
        return ops.dequantize_4bit(packed, state, torch.bfloat16, backend=backend) * 2

    compiled = torch.compile(decoded, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed), decoded(packed))


@pytest.mark.skipif(native.build_info() is None, reason=str(native.unavailable_reason()))
@pytest.mark.parametrize("base", [DENSE, NF4], ids=str)
@pytest.mark.parametrize("op", _op_arguments())
def test_opcheck(op: str, base: Base) -> None:
    result = torch.library.opcheck(
        getattr(torch.ops.fastlora, op).default,
        _op_arguments(base)[op],
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert set(result.values()) == {"SUCCESS"}


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    default = backends.choose(CALL._replace(dtype=torch.float32))
    assert default.name == ("reference" if native.unavailable_reason() else "native")
    with backends.use_backend("reference"):
        assert backends.choose(CALL).name == "reference"
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    assert backends.choose(CALL).name == "reference"
    monkeypatch.setenv("FASTLORA_BACKEND", "vulkan")
    with pytest.raises(ValueError, match=r"FASTLORA_BACKEND must be one of .*, got 'vulkan'"):
        backends.choose(CALL)
    monkeypatch.delenv("FASTLORA_BACKEND")
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.choose(CALL, "vulkan")
    # fp64 is the reference's alone: the automatic choice moves on, a forced one says why it can't.
    wide = CALL._replace(dtype=torch.float64)
    assert backends.choose(wide).name == "reference"
    with pytest.raises(RuntimeError, match="native: "):
        backends.choose(wide, "native")
