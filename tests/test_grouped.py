"""The grouped ops, and the layer on them, against the definition for every base and dtype."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import backends, grouped_lora_linear, ops, reference
from fastlora.backends import native
from fastlora.backends.composed import Composed
from fastlora.backends.contract import Request, unsupported_dropout
from fastlora.backends.schemas import flatten
from fastlora.layer import Layer, Needs
from fastlora.quant import QuantState
from tests.cases import DTYPES, Base
from tests.conftest import poisoned_memory
from tests.grouped_cases import CASES, Case, Inputs, make_inputs, segment_results
from tests.tolerance import assert_close_to_exact

CALL = Request("grouped_lora_linear_fwd", "cpu")
BASES = (Base(), Base("nf4", 64, nested=True), Base("fp4", 256), Base("mxfp4", 32))


def run(inputs: Inputs, backend: str, needs: Needs = Needs()) -> dict[str, Tensor | None]:
    layer = inputs.layer
    y, S = ops.grouped_lora_linear_fwd(inputs.x, layer, backend=backend)
    dx, dA, dB, dbias = ops.grouped_lora_linear_bwd(
        inputs.dy, inputs.x, layer, S, needs, backend=backend
    )
    assert dbias is None
    return {"y": y, "dx": dx, "dA": dA, "dB": dB}


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.BACKENDS[request.param].unsupported(CALL):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_definition(case: Case, base: Base, dtypes: str, backend: str) -> None:
    if base.quant_type is None and DTYPES[dtypes][2] is not None:
        pytest.skip("a dense weight has no compute dtype of its own")
    case = base.fit(case)
    if case.N * case.K % base.blocksize:
        pytest.skip("experts would share blocks, which the op refuses")
    inputs = make_inputs(case, base, DTYPES[dtypes])
    exact, plain = (segment_results(inputs, exactly) for exactly in (True, False))
    with poisoned_memory():
        got = run(inputs, backend)
    for name, out in got.items():
        assert out is not None and out.dtype == plain[name].dtype, name
        assert_close_to_exact(out, exact[name], plain[name], what=name)


@pytest.mark.parametrize("base", [Base(), Base("nf4", 64, nested=True)], ids=str)
def test_each_expert_is_the_plain_op(base: Base, backend: str) -> None:
    """Bit by bit, on each expert's rows; the dropout alone counts rows from the first expert."""
    case = Case("", (4, 4, 36, 47), 47, 128, 128, 8)
    inputs = make_inputs(case, base, DTYPES["bf16, fp32 adapter"])
    got = run(inputs, backend)
    for e, (begin, end) in enumerate(pairwise((0, *inputs.offsets.tolist()))):
        x, dy = inputs.x[begin:end], inputs.dy[begin:end]
        expert = Layer(inputs.weight[e], inputs.lora_A[e], inputs.lora_B[e], 1.5)
        if inputs.state is not None:
            state = reference.separable(inputs.state).expert(e)
            expert = expert._replace(weight=inputs.weight.view(4, -1)[e], quant_state=state)
        y, S = ops.lora_linear_fwd(x, expert, backend=backend)
        grads = ops.lora_linear_bwd(dy, x, expert, S, backend=backend)
        for name, want in zip(("y", "dx"), (y, grads.x), strict=True):
            assert torch.equal(got[name][begin:end], want), (name, e)
        assert torch.equal(got["dA"][e], grads.A) and torch.equal(got["dB"][e], grads.B)


@pytest.mark.parametrize("asked", range(8))
@pytest.mark.parametrize("base", [Base(), Base("nf4", 64)], ids=str)
def test_computes_and_reads_only_what_is_needed(asked: int, base: Base, backend: str) -> None:
    needs = Needs(bool(asked & 1), bool(asked & 2), bool(asked & 4))
    case = Case("", (2, 2, 21), 25, 40, 96, 4, 0.2)
    inputs = make_inputs(case, base, DTYPES["bf16, fp32 adapter"])
    everything = run(inputs, backend)
    layer = inputs.layer
    zeros = torch.zeros(3, 40, 96, dtype=torch.bfloat16)
    _, S = reference.grouped_lora_linear_fwd(
        inputs.x, layer._replace(weight=zeros, quant_state=None)
    )
    read = (inputs.x if needs.A else None, S if needs.B else None)
    some = ops.grouped_lora_linear_bwd(inputs.dy, read[0], layer, read[1], needs, backend=backend)
    for name, got, need in zip(("dx", "dA", "dB", "dbias"), some, needs, strict=True):
        if not need:
            assert got is None, name
        else:
            torch.testing.assert_close(got, everything[name])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_change_no_bit(count: int) -> None:
    if reason := native.unavailable_reason():
        pytest.skip(reason)
    case = Case("", (100, 101, 109, 120, 128, 150, 151, 190, 200), 200, 136, 192, 16, 0.1)
    inputs = make_inputs(case, Base("nf4", 64, nested=True), DTYPES["bf16, fp32 adapter"])
    first, threads = run(inputs, "native"), torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        again = run(inputs, "native")
    finally:
        torch.set_num_threads(threads)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name


def test_loop_over_experts() -> None:
    """What GPUs run: a backend's own ops on each expert, here with those of the reference."""
    case = Case("", (0, 7, 8, 20), 23, 40, 96, 3)
    for base in (Base(), Base("nf4", 64), Base("nf4", 32, nested=True)):
        inputs = make_inputs(case, base, DTYPES["fp32"])
        want = run(inputs, "reference")
        layer = inputs.layer
        y, S = Composed().grouped_lora_linear_fwd(inputs.x, layer)
        grads = Composed().grouped_lora_linear_bwd(inputs.dy, inputs.x, layer, S, Needs())
        assert grads.bias is None
        for name, got in zip(want, (y, *grads[:3]), strict=True):
            assert torch.equal(got, want[name]), (base, name)
        dx, *others = Composed().grouped_lora_linear_bwd(
            inputs.dy, None, layer, None, Needs(True, False, False)
        )
        assert torch.equal(dx, want["dx"]) and others == [None, None, None]


@pytest.mark.parametrize("base", [Base(), Base("nf4", 64)], ids=str)
def test_triton(base: Base) -> None:
    """The loop over Triton's kernels, in its interpreter; dropout is refused."""
    triton = backends.BACKENDS["triton"]
    if reason := triton.unsupported(CALL):
        pytest.skip(reason)
    case = Case("", (3, 3, 8), 9, 32, 64, 4)
    inputs = make_inputs(case, base, DTYPES["fp32"])
    exact, plain = (segment_results(inputs, exactly) for exactly in (True, False))
    for name, out in run(inputs, "triton").items():
        assert_close_to_exact(out, exact[name], plain[name], what=name)
    inputs.dropout_p = 0.1
    with pytest.raises(RuntimeError, match="no kernel whose dropout counts rows"):
        run(inputs, "triton")


def test_a_gpu_loop_declines_dropout() -> None:
    assert unsupported_dropout(CALL) is None
    assert unsupported_dropout(CALL._replace(op="lora_linear_fwd", dropout=True)) is None
    reason = unsupported_dropout(CALL._replace(op="grouped_lora_linear_bwd", dropout=True))
    assert reason == (
        "grouped_lora_linear_bwd has no kernel whose dropout counts rows from the first of all "
        "experts."
    )


OP_CASE = Case("", (2, 2, 5), 6, 32, 64, 2, 0.1)


@pytest.mark.skipif(native.build_info() is None, reason=str(native.unavailable_reason()))
@pytest.mark.parametrize("base", [Base(), Base("nf4", 64)], ids=str)
@pytest.mark.parametrize("op", ["grouped_lora_linear_fwd", "grouped_lora_linear_bwd"])
def test_opcheck(op: str, base: Base) -> None:
    inputs = make_inputs(OP_CASE, base, DTYPES["fp32"])
    layer, ends, S = inputs.layer, inputs.offsets.long(), torch.randn(6, 2)
    x: Tensor | None = inputs.x
    if base.quant_type is not None:
        layer = layer._replace(weight=layer.weight.view(-1), compute_dtype=torch.float32)
    arguments: tuple[Any, ...] = (x, *flatten(layer), ends)
    if op.endswith("bwd"):
        x = None if base.quant_type is None else x
        arguments = (inputs.dy, x, *flatten(layer), ends, S, True, False, True, False)
    result = torch.library.opcheck(
        getattr(torch.ops.fastlora, op).default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.skipif(native.build_info() is None, reason=str(native.unavailable_reason()))
def test_the_library_checks_what_it_reads() -> None:
    """Ends past the rows would read past x; Python's check may be bypassed."""
    inputs = make_inputs(OP_CASE, Base(), DTYPES["fp32"])
    x, layer, ends = inputs.x, inputs.layer, inputs.offsets.long()
    for wrong in ([2, 2, 7], [2, 1, 5], [-1, 2, 5]):
        with pytest.raises(RuntimeError, match="offsets must ascend from 0 to at most 6"):
            torch.ops.fastlora.grouped_lora_linear_fwd(x, *flatten(layer), torch.tensor(wrong))
    for wrong, message in (
        (layer.lora_B[:, :, :1], r"lora_B must be \[3, 32, 2\]"),
        (layer.lora_B[:, :31], r"weight must be \[3, 31, 64\]"),  # N is lora_B's
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastlora.grouped_lora_linear_fwd(
                x, *flatten(layer._replace(lora_B=wrong)), ends
            )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": torch.tensor([2, 1, 5])}, ValueError, r"offsets must ascend from 0 to at m"),
        ({"offsets": torch.tensor([2, 2, 7])}, ValueError, r"at most 6, got \[2, 2, 7\]"),
        ({"offsets": torch.tensor([2.0, 2, 5])}, ValueError, r"int32 or int64 \[3\]"),
        ({"offsets": torch.tensor([2, 5])}, ValueError, r"offsets must be .* \[3\], got \(2,\)"),
        ({"x": torch.randn(6, 63)}, ValueError, r"x must be \[M, K\] and weight \[E, N, K\]"),
        ({"x": torch.randn(6, 64).half()}, TypeError, "weight must have x's dtype torch.float16"),
        ({"lora_A": torch.randn(2, 2, 64)}, ValueError, r"lora_A must be \[3, R, 64\]"),
        ({"lora_B": torch.randn(3, 32, 3)}, ValueError, r"lora_B must be \[3, 32, 2\]"),
        ({"lora_B": torch.randn(3, 32, 2).half()}, TypeError, "lora_B must have lora_A's dtype"),
        ({"dropout_p": 0.1}, ValueError, "seed must be an int64 tensor of one element"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "weight": torch.randn(3, 32, 64),
        "offsets": torch.tensor([2, 2, 5]),
        "lora_A": torch.randn(3, 2, 64),
        "lora_B": torch.randn(3, 32, 2),
        "scaling": 1.0,
    } | change
    x = arguments.pop("x", torch.randn(6, 64))
    with pytest.raises(error, match=message):
        ops.grouped_lora_linear_fwd(x, Layer(**arguments))


def test_errors_of_packed_stacks_and_gradients() -> None:
    weight, state = reference.quantize_4bit(torch.randn(2, 9, 8))
    A, B, ends = torch.randn(2, 3, 8), torch.randn(2, 9, 3), torch.tensor([1, 4])
    x, dy = torch.randn(4, 8), torch.randn(4, 9)
    with pytest.raises(ValueError, match="whole blocks of 64 elements, got experts of 9 x 8"):
        ops.grouped_lora_linear_fwd(x, Layer(weight, A, B, 1.0, quant_state=state, offsets=ends))
    layer = Layer(torch.randn(2, 9, 8), A, B, 1.0, offsets=ends)
    with pytest.raises(ValueError, match=r"x must be \[4, 8\] where dA is needed, got None"):
        ops.grouped_lora_linear_bwd(dy, None, layer, None)
    with pytest.raises(ValueError, match=r"S must be \[4, 3\] where dB is needed, got None"):
        ops.grouped_lora_linear_bwd(dy, x, layer, None)
    with pytest.raises(ValueError, match=r"dy must be \[M, 9\], got \(4, 8\)"):
        ops.grouped_lora_linear_bwd(x, x, layer, None)
    with pytest.raises(ValueError, match="multiple of 256 blocks for each expert"):
        reference.quantize_4bit(torch.randn(2, 8, 8), compress_statistics=True)[1].expert(0)


# ---- the differentiable function -----------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_function_in_float64(transposed: bool, quantised: bool) -> None:
    """The reference's gradients by autograd's own check, in both layouts."""
    E, M, N, K, R = 3, 7, 8, 16, 2
    weight, state = torch.randn(E, K, N).double(), None
    if quantised:
        weight, state = reference.quantize_4bit(torch.randn(E, K, N))
    if not transposed:
        weight, state = _as_rows(weight, state)
    x, A, B = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((M, K), (E, R, K), (E, N, R))
    )
    offsets = torch.tensor([3, 3, 6])

    def f(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        options = {"quant_state": state, "transposed": transposed, "backend": "reference"}
        return grouped_lora_linear(x, weight, offsets, A, B, 1.5, **options)

    dense = weight if state is None else reference.dequantize_4bit(weight, state, torch.float64)
    W = dense if transposed else dense.mT
    adapted = W + 1.5 * A.mT @ B.mT
    want = torch.cat([x[:3] @ adapted[0], x[3:6] @ adapted[2], x.new_zeros(1, N)])
    torch.testing.assert_close(f(x, A, B), want)
    assert torch.autograd.gradcheck(f, (x, A, B))


def _as_rows(weight: Tensor, state: QuantState | None) -> tuple[Tensor, QuantState | None]:
    """The same experts stored as [E, N, K]."""
    if state is None:
        return weight.mT.contiguous(), None
    return reference.quantize_4bit(reference.dequantize_4bit(weight, state).mT.contiguous())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16, fp32 adapter", "fp16"])
@pytest.mark.parametrize("quantised", [False, True])
def test_function_against_plain_torch(
    transposed: bool, dtypes: str, quantised: bool, backend: str
) -> None:
    x_dtype, adapter_dtype, _ = DTYPES[dtypes]
    ends, M, N, K, R = (0, 9, 9, 42, 43), 45, 56, 72, 5
    E, shape = len(ends), (K, N) if transposed else (N, K)
    weight, state = (torch.randn(E, *shape) * K**-0.5).to(x_dtype), None
    dense = weight
    if quantised:
        weight, state = reference.quantize_4bit(weight, 32, compress_statistics=True)
        dense = reference.dequantize_4bit(weight, state, x_dtype)
    inputs = {
        "x": torch.randn(M, K).to(x_dtype),
        "A": (torch.randn(E, R, K) * K**-0.5).to(adapter_dtype),
        "B": (torch.randn(E, N, R) * R**-0.5).to(adapter_dtype),
    }
    dy = torch.randn(M, N).to(x_dtype)

    def plain(x: Tensor, A: Tensor, B: Tensor, W: Tensor) -> Tensor:
        layer = Layer(W.mT if transposed else W, A, B, 1.5, offsets=torch.tensor(ends))
        return reference.plain.grouped_lora_linear(x, layer)

    results = []
    for way in ("fast", "exact", "plain"):
        dtype = torch.float64 if way == "exact" else None
        leaves = {k: t.detach().to(dtype or t.dtype).requires_grad_() for k, t in inputs.items()}
        if way == "fast":
            y = grouped_lora_linear(
                leaves["x"], weight, torch.tensor(ends), leaves["A"], leaves["B"], 1.5,
                quant_state=state, transposed=transposed, backend=backend,
            )  # fmt: skip
        else:
            y = plain(leaves["x"], leaves["A"], leaves["B"], dense.to(dtype or x_dtype))
        y.backward(dy.to(y.dtype))
        results.append({"y": y.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}})
    for name, out in results[0].items():
        assert_close_to_exact(out, results[1][name], results[2][name], what=name)


def test_function_needs_only_what_trains() -> None:
    x, A, B = torch.randn(5, 8), torch.randn(2, 3, 8), torch.randn(2, 6, 3)
    ends = torch.tensor([2, 5])
    for weight, transposed in ((torch.randn(2, 6, 8), False), (torch.randn(2, 8, 6), True)):
        for leaf in (x, A, B):
            leaf.requires_grad_()
            grouped_lora_linear(x, weight, ends, A, B, 1.0, transposed=transposed).sum().backward()
            assert leaf.grad is not None and all(t.grad is None for t in (x, A, B) if t is not leaf)
            leaf.requires_grad_(False).grad = None


def test_function_refuses() -> None:
    x, A, B, ends = (
        torch.randn(5, 8),
        torch.randn(2, 3, 8),
        torch.randn(2, 6, 3),
        torch.tensor([2, 5]),
    )
    V = torch.randn(2, 8, 6)
    with pytest.raises(ValueError, match=r"dropout_p must be 0 for transposed experts, got 0\.1"):
        grouped_lora_linear(x, V, ends, A, B, 1.0, transposed=True, dropout_p=0.1)
    with pytest.raises(ValueError, match="weight must be frozen"):
        grouped_lora_linear(x, V.requires_grad_(), ends, A, B, 1.0, transposed=True)


def test_function_drops_and_casts() -> None:
    """Dropout from torch's generator, off in evaluation; autocast's dtype for x and the weight."""
    x, A, B = torch.randn(9, 64), torch.randn(2, 3, 64), torch.randn(2, 6, 3)
    W, ends = torch.randn(2, 6, 64), torch.tensor([4, 9])
    torch.manual_seed(3)
    first = grouped_lora_linear(x, W, ends, A, B, 1.0, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, grouped_lora_linear(x, W, ends, A, B, 1.0, dropout_p=0.5))
    plain = grouped_lora_linear(x, W, ends, A, B, 1.0)
    assert not torch.equal(first, plain)
    off = grouped_lora_linear(x, W, ends, A, B, 1.0, dropout_p=0.5, training=False)
    assert torch.equal(off, plain)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = grouped_lora_linear(x, W, ends, A, B, 1.0)
    assert narrow.dtype == torch.bfloat16
    narrowed = [t.bfloat16() for t in (x, W, A, B)]
    want = grouped_lora_linear(narrowed[0], narrowed[1], ends, *narrowed[2:], 1.0)
    assert torch.equal(narrow, want)
