"""The ops of DoRA against their definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import ops, reference
from fastlora.backends import BACKENDS
from fastlora.backends.contract import Request
from fastlora.backends.schemas import flatten
from fastlora.layer import Layer
from fastlora.ops import dequantize_4bit, quantize_4bit
from fastlora.reference import dropout_mask
from tests.conftest import poisoned_memory
from tests.tolerance import assert_close_to_exact

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FLOATS = (FP32, BF16, FP16)
SCALING, SEED, P = 0.7, torch.tensor([-12345]), 0.3
# M, N: below a vector, a tile and one more, several strips; no multiple of any.
SHAPES = ((0, 5), (1, 1), (7, 33), (17, 129), (33, 1027), (129, 300))
# N, K, R: below a vector, two tiles of rows, two blocks of columns, a rank above N.
NORMS = ((1, 1, 1), (41, 72, 3), (49, 257, 16), (97, 300, 65), (5, 640, 8), (7, 33, 256))


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := BACKENDS[request.param].unsupported(Request("dora_norm", "cpu")):
        pytest.skip(reason)
    return request.param


def spread(matrix: Tensor) -> Tensor:
    """The same matrix with its rows lying apart."""
    return torch.cat([matrix, matrix], dim=1)[:, : matrix.shape[1]]


# ---- norms -------------------------------------------------------------------------------------


def norms_of(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return reference.plain.dora_norm(W, A, B, SCALING)


@pytest.mark.parametrize("size", [0.1, 3.0], ids=["small", "large"])
@pytest.mark.parametrize("adapter_dtype", [FP32, BF16])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["dense", "transposed", "nf4", "nf4 nested", "fp4"])
@pytest.mark.parametrize("sizes", NORMS, ids=str)
def test_norm(
    sizes: tuple[int, int, int],
    kind: str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    size: float,
    backend: str,
) -> None:
    N, K, R = sizes
    W = torch.randn(N, K).div(K**0.5).to(dtype)
    A, B = (torch.randn(*s).mul(size).to(adapter_dtype) for s in ((R, K), (N, R)))
    with poisoned_memory():
        if kind in ("dense", "transposed"):
            weight = W if kind == "dense" else W.T.contiguous().T
            norms = ops.dora_norm(Layer(weight, A, B, SCALING), backend=backend)
        else:
            packed, state = quantize_4bit(W, 64, kind.split()[0], kind.endswith("nested"))
            layer = Layer(packed, A, B, SCALING, quant_state=state)
            norms = ops.dora_norm(layer, backend=backend)
            W = dequantize_4bit(packed, state, dtype)
    exact = norms_of(W.double(), A.double(), B.double())
    assert norms.dtype == FP32
    assert_close_to_exact(norms, exact, norms_of(W.float(), A.float(), B.float()), what=kind)


def test_norm_where_both_parts_cancel(backend: str) -> None:
    """What an expansion of the square would lose."""
    A, B = torch.randn(4, 96), torch.randn(50, 4)
    W = -SCALING * (B @ A) + 1e-4 * torch.randn(50, 96)
    norms = ops.dora_norm(Layer(W, A, B, SCALING), backend=backend)
    exact = norms_of(W.double(), A.double(), B.double())
    assert_close_to_exact(norms, exact, norms_of(W, A, B), what="norms")


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_norm_of_nothing(sizes: tuple[int, int], backend: str) -> None:
    N, K = sizes
    layer = Layer(torch.ones(N, K), torch.ones(2, K), torch.ones(N, 2), 1.0)
    norms = ops.dora_norm(layer, backend=backend)
    assert torch.equal(norms, torch.zeros(N))


@pytest.mark.parametrize("storage", [BF16, FP32])
def test_packed_bytes_in_another_storage(storage: torch.dtype, backend: str) -> None:
    """As FSDP wants them: bnb_4bit_quant_storage."""
    packed, state = quantize_4bit(torch.randn(48, 64), 64, "nf4", True)
    A, B = torch.randn(3, 64), torch.randn(48, 3)
    layer = Layer(packed, A, B, SCALING, quant_state=state)
    want = ops.dora_norm(layer, backend=backend)
    stored = layer._replace(weight=packed.view(-1).view(storage))
    assert torch.equal(ops.dora_norm(stored, backend=backend), want)


# ---- magnitude ---------------------------------------------------------------------------------


def make_magnitude(
    shape: tuple[int, int], dtype: torch.dtype, kind: str
) -> tuple[list[Tensor], Tensor]:
    M, N = shape
    inputs = [torch.randn(M, N).to(dtype), torch.rand(N) + 0.5]
    if kind == "matrix":
        inputs.append(torch.randn(M, N).to(dtype))
    elif kind != "none":
        inputs.append(torch.randn(N).to(FP32 if kind == "fp32 bias" else dtype))
    return inputs, torch.randn(M, N).to(dtype)


def magnitude_results(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    dy: Tensor,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = function(*leaves, *(None,) * (3 - len(leaves)))
    grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(("dz", "dfactor", "drest"), grads, strict=False))}


def magnitude_op_results(inputs: list[Tensor], dy: Tensor, backend: str) -> dict[str, Tensor]:
    z, factor, rest = *inputs, *(None,) * (3 - len(inputs))
    y = ops.dora_magnitude_fwd(z, factor, rest, backend=backend)
    summed = rest is not None and rest.dim() == 1
    needs = (True, True, summed)
    dz, dfactor, drest = ops.dora_magnitude_bwd(dy, z, factor, needs, backend=backend)
    found = {"y": y, "dz": dz, "dfactor": dfactor}
    return found | ({"drest": drest.to(rest.dtype)} if summed else {})


@pytest.mark.parametrize("kind", ["none", "bias", "fp32 bias", "matrix"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_magnitude(shape: tuple[int, int], dtype: torch.dtype, kind: str, backend: str) -> None:
    inputs, dy = make_magnitude(shape, dtype, kind)
    with poisoned_memory():
        got = magnitude_op_results(inputs, dy, backend)
    exact = magnitude_results(reference.plain.dora_magnitude, inputs, dy, torch.float64)
    plain = magnitude_results(reference.plain.dora_magnitude, inputs, dy)
    for name, out in got.items():
        assert out.dtype == plain[name].dtype, name
        assert_close_to_exact(out, exact[name], plain[name], what=name)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]
)
def test_magnitude_computes_only_what_is_needed(
    needs: tuple[bool, bool, bool], backend: str
) -> None:
    inputs, dy = make_magnitude((129, 67), BF16, "none")
    everything = ops.dora_magnitude_bwd(dy, *inputs, (True, True, True), backend=backend)
    some = ops.dora_magnitude_bwd(dy, *inputs, needs, backend=backend)
    for need, one, all_of_it in zip(needs, some, everything, strict=True):
        assert (one is not None) == need
        assert one is None or (all_of_it is not None and torch.equal(one, all_of_it))


def test_magnitude_layouts(backend: str) -> None:
    """Rows that lie apart, and a dy that is one number for all, as from `y.sum()`."""
    inputs, dy = make_magnitude((40, 67), BF16, "matrix")
    want = magnitude_op_results(inputs, dy, backend)
    z, factor, rest = inputs
    apart = [spread(z), factor[:, None].expand(-1, 2)[:, 0], rest.T.contiguous().T]
    assert not any(t.is_contiguous() for t in (apart[0], apart[2]))
    y = ops.dora_magnitude_fwd(*apart, backend=backend)
    assert torch.equal(y, want["y"])
    dz, dfactor, _ = ops.dora_magnitude_bwd(spread(dy), *apart[:2], backend=backend)
    assert dz is not None and torch.equal(dz, want["dz"])
    assert dfactor is not None and torch.equal(dfactor, want["dfactor"])
    ones = torch.ones(()).to(BF16).expand(40, 67)
    dz, dfactor, _ = ops.dora_magnitude_bwd(ones, z, factor, backend=backend)
    assert dz is not None and torch.equal(dz, factor.to(BF16).expand(40, 67))
    torch.testing.assert_close(dfactor, z.float().sum(0))


# ---- dropout -----------------------------------------------------------------------------------


def dropout_results(
    function: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    dys: tuple[Tensor, Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    leaf = x.detach().to(dtype or x.dtype).requires_grad_()
    kept, rest = function(leaf)
    (dx,) = torch.autograd.grad((kept, rest), leaf, tuple(dy.to(leaf.dtype) for dy in dys))
    return {"kept": kept.detach(), "rest": rest.detach(), "dx": dx}


def op_results(x: Tensor, p: float, dys: tuple[Tensor, Tensor], backend: str) -> dict[str, Tensor]:
    kept, rest = ops.dora_dropout_fwd(x, p, SEED, backend=backend)
    return {
        "kept": kept,
        "rest": rest,
        "dx": ops.dora_dropout_bwd(*dys, p, SEED, backend=backend),
    }


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout(shape: tuple[int, int], dtype: torch.dtype, p: float, backend: str) -> None:
    x, *dys = (torch.randn(shape).to(dtype) for _ in range(3))
    with poisoned_memory():
        got = op_results(x, p, (dys[0], dys[1]), backend)

    def sequence(x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.plain.dora_dropout(x, p, SEED)

    exact = dropout_results(sequence, x, (dys[0], dys[1]), torch.float64)
    plain = dropout_results(sequence, x, (dys[0], dys[1]))
    assert torch.equal(got["kept"], plain["kept"])
    for name, out in got.items():
        assert out.dtype == dtype
        assert_close_to_exact(out, exact[name], plain[name], what=name)


def test_dropped_infinities_are_zero(backend: str) -> None:
    x = torch.full((5, 200), torch.inf)
    kept, rest = ops.dora_dropout_fwd(x, P, SEED, backend=backend)
    mask = dropout_mask(5, 200, P, SEED)
    assert torch.equal(kept, torch.where(mask, x, 0))
    assert torch.equal(rest, torch.where(mask, -x, x))


def test_dropout_of_rows_that_lie_apart(backend: str) -> None:
    x, dkept, drest = torch.randn(3, 40, 67)
    for got, want in zip(
        ops.dora_dropout_fwd(spread(x), P, SEED, backend=backend),
        ops.dora_dropout_fwd(x, P, SEED, backend=backend),
        strict=True,
    ):
        assert torch.equal(got, want)
    dx = ops.dora_dropout_bwd(dkept, drest, P, SEED, backend=backend)
    args = spread(dkept), drest.T.contiguous().T, P, SEED
    assert torch.equal(ops.dora_dropout_bwd(*args, backend=backend), dx)


# ---- all of them -------------------------------------------------------------------------------


def test_same_bits_on_any_number_of_threads() -> None:
    (z, factor, rest), dy = make_magnitude((300, 1500), BF16, "matrix")
    A, B = torch.randn(16, 1500), torch.randn(300, 16)

    def results() -> list[Tensor | None]:
        return [
            ops.dora_norm(Layer(z, A, B, SCALING)),
            ops.dora_magnitude_fwd(z, factor, rest),
            *ops.dora_magnitude_bwd(dy, z, factor, (True, True, True)),
            *ops.dora_dropout_fwd(z, P, SEED),
            ops.dora_dropout_bwd(dy, z, P, SEED),
        ]

    first, threads = results(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for got, want in zip(results(), first, strict=True):
                assert got is not None and want is not None and torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)


Z, FACTOR = torch.randn(3, 5), torch.randn(5)


def four_bit(weight: Tensor) -> Layer:
    packed, state = quantize_4bit(weight)
    return Layer(packed, Z, Z, 1.0, quant_state=state)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.dora_norm(Layer(Z[0], Z, Z, 1.0)), ValueError, r"weight must be \[N, K\]"),
        (lambda: ops.dora_norm(Layer(Z, Z[:, :4], Z, 1.0)), ValueError, r"lora_A must be \[R, 5\]"),
        (lambda: ops.dora_norm(Layer(Z, Z, Z, 1.0)), ValueError, r"lora_B must be \[3, 3\]"),
        (
            lambda: ops.dora_norm(Layer(Z, Z[:2], Z[:, :2].half(), 1.0)),
            TypeError,
            "lora_B must be in torch.float32",
        ),
        (
            lambda: ops.dora_norm(four_bit(torch.randn(64))),
            ValueError,
            r"quant_state.shape must be \[N, K\]",
        ),
        (
            lambda: ops.dora_norm(four_bit(Z)._replace(weight=Z.byte())),
            ValueError,
            "weight must hold 8 bytes",
        ),
        (lambda: ops.dora_magnitude_fwd(Z[0], FACTOR, None), ValueError, r"z must be \[M, N\]"),
        (lambda: ops.dora_magnitude_fwd(Z, FACTOR[:4], None), ValueError, r"factor must be \[5\]"),
        (lambda: ops.dora_magnitude_fwd(Z, FACTOR.half(), None), TypeError, "factor must be in"),
        (lambda: ops.dora_magnitude_fwd(Z, FACTOR, Z[:2]), ValueError, r"rest must be \[3, 5\]"),
        (lambda: ops.dora_magnitude_bwd(Z[:2], Z, FACTOR), ValueError, r"dy must be \[3, 5\]"),
        (lambda: ops.dora_magnitude_bwd(Z.half(), Z, FACTOR), TypeError, "dy must be in"),
        (lambda: ops.dora_dropout_fwd(Z[0], P, SEED), ValueError, r"x must be \[M, K\]"),
        (lambda: ops.dora_dropout_fwd(Z, 0.0, SEED), ValueError, "dropout_p must be above 0"),
        (lambda: ops.dora_dropout_fwd(Z, 1.5, SEED), ValueError, "dropout_p must be above 0"),
        (lambda: ops.dora_dropout_fwd(Z, P, FACTOR), ValueError, "seed must be an int64"),
        (lambda: ops.dora_dropout_bwd(Z, Z.half(), P, SEED), TypeError, "drest must be in"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_opcheck() -> None:
    if reason := BACKENDS["native"].unsupported(Request("dora_norm", "cpu")):
        pytest.skip(reason)
    native: Any = torch.ops.fastlora
    A, B = torch.randn(2, 5), torch.randn(3, 2)
    packed, state = quantize_4bit(Z, 64, "nf4", True)
    dense = Layer(Z, A, B, SCALING)
    stored = Layer(packed.view(-1), A, B, SCALING, quant_state=state, compute_dtype=FP32)
    for op, args in (
        (native.dora_norm, flatten(dense)),
        (native.dora_norm, flatten(stored)),
        (native.dora_magnitude_fwd, (Z, FACTOR, FACTOR)),
        (native.dora_magnitude_fwd, (Z, FACTOR, None)),
        (native.dora_magnitude_bwd, (Z, Z, FACTOR, True, True, True)),
        (native.dora_magnitude_bwd, (Z, Z, FACTOR, False, False, False)),
        (native.dora_dropout_fwd, (Z, P, SEED)),
        (native.dora_dropout_bwd, (Z, Z, P, SEED)),
    ):
        result = torch.library.opcheck(op.default, args)
        assert set(result.values()) == {"SUCCESS"}, op


def test_reference_goes_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts as in one."""
    inputs, dy = make_magnitude((40, 67), BF16, "matrix")
    layer = Layer(inputs[0], dy[:3].float(), dy[:, :3].float(), SCALING)

    def results() -> list[Tensor | None]:
        return [
            reference.dora_norm(layer),
            reference.dora_magnitude_fwd(*inputs),
            *reference.dora_magnitude_bwd(dy, *inputs[:2]),
            reference.dora_dropout_bwd(dy, inputs[0], P, SEED),
        ]

    with torch.no_grad():
        whole = results()
        monkeypatch.setattr("fastlora.reference.dora._BLOCK", 300)
        for got, want in zip(results(), whole, strict=True):
            if want is not None:
                torch.testing.assert_close(got, want)
