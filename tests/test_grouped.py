"""The grouped ops, and the layer on them, against the definition for every base and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import backends, grouped_lora_linear, ops, reference
from fastlora.backends import grouped, native
from fastlora.layer import Layer
from fastlora.quant import QuantState
from tests.cases import DTYPES, Base, autograd_results
from tests.conftest import poisoned_memory
from tests.tolerance import assert_close_to_exact


@dataclass(frozen=True)
class Case:
    """Sizes of one call; `ends` are the offsets."""

    name: str
    ends: tuple[int, ...]
    M: int
    N: int
    K: int
    R: int
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return self.name


# N K is a whole number of blocks, of 256 elements at most, and no multiple of 256 blocks of 64.
CASES = (
    Case("no tokens", (0, 0, 0), 0, 32, 24, 4, 0.1),
    Case("one token, four experts", (0, 0, 1, 1), 1, 96, 80, 8),
    Case("empty first, middle and last expert", (0, 7, 7, 24, 24), 24, 40, 96, 3, 0.2),
    Case("rows after the last expert", (5, 9), 17, 48, 112, 5, 0.1),
    Case("one long expert among short ones", (1, 130, 133, 140, 141), 141, 72, 160, 8, 0.05),
    Case("more experts than rows", tuple(range(1, 20)) + (19,) * 12, 19, 33, 128, 2, 0.3),
    Case("one expert, rank above N", (33,), 33, 16, 208, 64, 0.5),
    Case("everything dropped", (3, 12), 12, 32, 40, 4, 1.0),
)


BASES = (Base(), Base("nf4", 64, nested=True), Base("fp4", 256), Base("mxfp4", 32))


@dataclass
class Inputs:
    """Tensors of one call; `weight` is packed where `state` is given."""

    x: Tensor
    weight: Tensor
    state: QuantState | None
    offsets: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    compute: torch.dtype | None
    scaling: float = 1.5

    @property
    def seed(self) -> Tensor:
        return torch.tensor([0x1234_5678_9ABC_DEF])


def make_inputs(case: Case, base: Base, dtypes: tuple[Any, Any, Any]) -> Inputs:
    x_dtype, adapter_dtype, compute = dtypes
    E, M, N, K, R = len(case.ends), case.M, case.N, case.K, case.R
    weight, state = torch.randn(E, N, K) * K**-0.5, None
    if base.quant_type is None:
        weight = weight.to(x_dtype)
    else:
        weight, state = reference.quantize_4bit(
            weight, base.blocksize, base.quant_type, base.nested
        )
    return Inputs(
        x=torch.randn(M, K + 5).to(x_dtype)[:, :K],  # rows lie apart
        weight=weight,
        state=state,
        offsets=torch.tensor(case.ends, dtype=torch.int32),
        lora_A=(torch.randn(E, R, K) * K**-0.5).to(adapter_dtype),
        lora_B=(torch.randn(E, N, R) * R**-0.5).to(adapter_dtype),
        dy=torch.randn(M, N).to(x_dtype),
        compute=compute,
    )


def run(
    case: Case,
    inputs: Inputs,
    backend: str,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> dict[str, Tensor | None]:
    options = (inputs.scaling, case.dropout_p, inputs.seed)
    adapters = (inputs.lora_A, inputs.lora_B)
    base: tuple[Any, ...] = (inputs.weight, inputs.offsets)
    forward, backward, extra = ops.grouped_lora_linear_fwd, ops.grouped_lora_linear_bwd, ()
    if inputs.state is not None:
        base = (inputs.weight, inputs.state, inputs.offsets)
        forward, backward = ops.grouped_qlora_linear_fwd, ops.grouped_qlora_linear_bwd
        extra = (inputs.compute,)
    y, S = forward(inputs.x, *base, *adapters, *options, *extra, backend=backend)
    args = (inputs.dy, inputs.x, *base, *adapters, S, *options, *extra, needs)
    dx, dA, dB = backward(*args, backend=backend)
    return {"y": y, "dx": dx, "dA": dA, "dB": dB}


def segment_results(case: Case, inputs: Inputs, exactly: bool) -> dict[str, Tensor]:
    """The plain sequence, expert by expert, under torch's autograd: in fp64 or as is."""
    layer = Layer(
        inputs.weight,
        inputs.lora_A,
        inputs.lora_B,
        inputs.scaling,
        quant_state=inputs.state,
        compute_dtype=inputs.compute,
        dropout_p=case.dropout_p,
        seed=inputs.seed,
        offsets=inputs.offsets,
    )
    x = inputs.x
    if exactly:
        layer, x = reference.plain.widened(layer), x.double()
    results = autograd_results(reference.plain.grouped_lora_linear, x, layer, inputs.dy)
    return {name: out for name, out in results.items() if out is not None}


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.BACKENDS[request.param].unsupported("grouped_lora_linear_fwd", "cpu"):
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
    exact, plain = (segment_results(case, inputs, exactly) for exactly in (True, False))
    with poisoned_memory():
        got = run(case, inputs, backend)
    for name, out in got.items():
        assert out is not None and out.dtype == plain[name].dtype, name
        assert_close_to_exact(out, exact[name], plain[name], what=name)


@pytest.mark.parametrize("base", [Base(), Base("nf4", 64, nested=True)], ids=str)
def test_each_expert_is_the_plain_op(base: Base, backend: str) -> None:
    """Bit by bit, on each expert's rows; the dropout alone counts rows from the first expert."""
    case = Case("", (4, 4, 36, 47), 47, 128, 128, 8)
    inputs = make_inputs(case, base, DTYPES["bf16, fp32 adapter"])
    got = run(case, inputs, backend)
    for e, begin, end in reference.segments(inputs.offsets):
        x, dy, A, B = inputs.x[begin:end], inputs.dy[begin:end], inputs.lora_A[e], inputs.lora_B[e]
        if inputs.state is None:
            W = inputs.weight[e]
            y, S = ops.lora_linear_fwd(x, W, None, A, B, 1.5, backend=backend)
            grads = ops.lora_linear_bwd(dy, x, W, A, B, S, 1.5, backend=backend)
        else:
            state = grouped.separable(inputs.state).expert(e)
            packed = inputs.weight.view(4, -1)[e]
            y, S = ops.qlora_linear_fwd(x, packed, state, None, A, B, 1.5, backend=backend)
            grads = ops.qlora_linear_bwd(dy, x, packed, state, A, B, S, 1.5, backend=backend)
        for name, want in zip(("y", "dx"), (y, grads[0]), strict=True):
            assert torch.equal(got[name][begin:end], want), (name, e)
        assert torch.equal(got["dA"][e], grads[1]) and torch.equal(got["dB"][e], grads[2])


@pytest.mark.parametrize("asked", range(8))
@pytest.mark.parametrize("base", [Base(), Base("nf4", 64)], ids=str)
def test_computes_and_reads_only_what_is_needed(asked: int, base: Base, backend: str) -> None:
    needs = (bool(asked & 1), bool(asked & 2), bool(asked & 4))
    case = Case("", (2, 2, 21), 25, 40, 96, 4, 0.2)
    inputs = make_inputs(case, base, DTYPES["bf16, fp32 adapter"])
    everything = run(case, inputs, backend)
    _, S = reference.grouped_lora_linear_fwd(
        inputs.x, torch.zeros(3, 40, 96, dtype=torch.bfloat16), inputs.offsets, inputs.lora_A,
        inputs.lora_B, 1.5, 0.2, inputs.seed,
    )  # fmt: skip
    read = (inputs.x if needs[1] else None, S if needs[2] else None)
    lora = (inputs.offsets, inputs.lora_A, inputs.lora_B, read[1], 1.5, 0.2, inputs.seed)
    if inputs.state is None:
        some = ops.grouped_lora_linear_bwd(
            inputs.dy, read[0], inputs.weight, *lora, needs, backend=backend
        )
    else:
        some = ops.grouped_qlora_linear_bwd(
            inputs.dy, read[0], inputs.weight, inputs.state, *lora, None, needs, backend=backend
        )
    for name, got, need in zip(("dx", "dA", "dB"), some, needs, strict=True):
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
    first, threads = run(case, inputs, "native"), torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        again = run(case, inputs, "native")
    finally:
        torch.set_num_threads(threads)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name


def test_loop_over_experts() -> None:
    """What GPUs run: a backend's own ops on each expert, here with those of the reference."""
    case = Case("", (0, 7, 8, 20), 23, 40, 96, 3)
    for base in (Base(), Base("nf4", 64), Base("nf4", 32, nested=True)):
        inputs = make_inputs(case, base, DTYPES["fp32"])
        want = run(case, inputs, "reference")
        module = backends.BACKENDS["reference"]
        stack = (inputs.weight, inputs.state, inputs.offsets, inputs.lora_A, inputs.lora_B)
        y, S = grouped.forward(module, inputs.x, *stack, 1.5)
        grads = grouped.backward(
            module, inputs.dy, inputs.x, *stack, S, 1.5, None, (True, True, True)
        )
        for name, got in zip(want, (y, *grads), strict=True):
            assert torch.equal(got, want[name]), (base, name)
        dx, *others = grouped.backward(
            module, inputs.dy, None, *stack, None, 1.5, None, (True, False, False)
        )
        assert torch.equal(dx, want["dx"]) and others == [None, None]


@pytest.mark.parametrize("base", [Base(), Base("nf4", 64)], ids=str)
def test_triton(base: Base) -> None:
    """The loop over Triton's kernels, in its interpreter; dropout is refused."""
    triton = backends.BACKENDS["triton"]
    if reason := triton.unsupported("grouped_lora_linear_fwd", "cpu"):
        pytest.skip(reason)
    case = Case("", (3, 3, 8), 9, 32, 64, 4)
    inputs = make_inputs(case, base, DTYPES["fp32"])
    exact, plain = (segment_results(case, inputs, exactly) for exactly in (True, False))
    for name, out in run(case, inputs, "triton").items():
        assert_close_to_exact(out, exact[name], plain[name], what=name)
    dropping = Case("", (3, 3, 8), 9, 32, 64, 4, dropout_p=0.1)
    with pytest.raises(RuntimeError, match="no kernel whose dropout counts rows"):
        run(dropping, inputs, "triton")


def test_a_gpu_loop_declines_dropout() -> None:
    assert grouped.unsupported("grouped_lora_linear_fwd", 0.0) is None
    assert grouped.unsupported("lora_linear_fwd", 0.1) is None
    reason = grouped.unsupported("grouped_lora_linear_bwd", 0.1)
    assert reason == (
        "grouped_lora_linear_bwd has no kernel whose dropout counts rows from the first of all "
        "experts."
    )


def _op_arguments() -> dict[str, tuple]:
    case = Case("", (2, 2, 5), 6, 32, 64, 2, 0.1)
    dense = make_inputs(case, Base(), DTYPES["fp32"])
    packed = make_inputs(case, Base("nf4", 64), DTYPES["fp32"])
    ends, S = dense.offsets.long(), torch.randn(6, 2)
    A, B, options, needs = dense.lora_A, dense.lora_B, (1.0, 0.1, dense.seed), (True, False, True)
    quant = (packed.weight.view(-1), *native.state_args(packed.state), torch.float32, ends)
    x, W, dy = dense.x, dense.weight, dense.dy
    return {
        "grouped_lora_linear_fwd": (x, W, ends, A, B, *options),
        "grouped_lora_linear_bwd": (dy, None, W, ends, A, B, S, *options, *needs),
        "grouped_qlora_linear_fwd": (x, *quant, A, B, *options),
        "grouped_qlora_linear_bwd": (dy, x, *quant, A, B, S, *options, *needs),
    }


@pytest.mark.skipif(native.build_info() is None, reason=str(native.unavailable_reason()))
@pytest.mark.parametrize("op", _op_arguments())
def test_opcheck(op: str) -> None:
    result = torch.library.opcheck(
        getattr(torch.ops.fastlora, op).default,
        _op_arguments()[op],
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.skipif(native.build_info() is None, reason=str(native.unavailable_reason()))
def test_the_library_checks_what_it_reads() -> None:
    """Ends past the rows would read past x; Python's check may be bypassed."""
    x, W, ends, A, B, *options = _op_arguments()["grouped_lora_linear_fwd"]
    for wrong in ([2, 2, 7], [2, 1, 5], [-1, 2, 5]):
        with pytest.raises(RuntimeError, match="offsets must ascend from 0 to at most 6"):
            torch.ops.fastlora.grouped_lora_linear_fwd(x, W, torch.tensor(wrong), A, B, *options)
    with pytest.raises(RuntimeError, match=r"lora_B must be \[3, 32, 2\]"):
        torch.ops.fastlora.grouped_lora_linear_fwd(x, W, ends, A, B[:, :31], *options)


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
        "x": torch.randn(6, 64),
        "weight": torch.randn(3, 32, 64),
        "offsets": torch.tensor([2, 2, 5]),
        "lora_A": torch.randn(3, 2, 64),
        "lora_B": torch.randn(3, 32, 2),
        "scaling": 1.0,
    }
    with pytest.raises(error, match=message):
        ops.grouped_lora_linear_fwd(**{**arguments, **change})


def test_errors_of_packed_stacks_and_gradients() -> None:
    weight, state = reference.quantize_4bit(torch.randn(2, 9, 8))
    A, B, ends = torch.randn(2, 3, 8), torch.randn(2, 9, 3), torch.tensor([1, 4])
    x, dy = torch.randn(4, 8), torch.randn(4, 9)
    with pytest.raises(ValueError, match="whole blocks of 64 elements, got experts of 9 x 8"):
        ops.grouped_qlora_linear_fwd(x, weight, state, ends, A, B, 1.0)
    W = torch.randn(2, 9, 8)
    with pytest.raises(ValueError, match=r"x must be \[4, 8\] where dA is needed, got None"):
        ops.grouped_lora_linear_bwd(dy, None, W, ends, A, B, None, 1.0)
    with pytest.raises(ValueError, match=r"S must be \[4, 3\] where dB is needed, got None"):
        ops.grouped_lora_linear_bwd(dy, x, W, ends, A, B, None, 1.0)
    with pytest.raises(ValueError, match=r"dy must be \[M, 9\], got \(4, 8\)"):
        ops.grouped_lora_linear_bwd(x, x, W, ends, A, B, None, 1.0)
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
