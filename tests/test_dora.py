"""The ops of DoRA against their definition, and their layers under torch's autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import ops, reference
from fastlora.autograd.dora import dora_linear
from fastlora.backends import BACKENDS, use_backend
from fastlora.backends.contract import Request
from fastlora.backends.schemas import flatten
from fastlora.layer import Layer
from fastlora.ops import dequantize_4bit, quantize_4bit
from fastlora.quant import QuantState
from fastlora.reference import dropout_mask
from tests.conftest import poisoned_memory
from tests.second_order import second_order
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


# ---- the layer ---------------------------------------------------------------------------------

NAMES = ("x", "bias", "lora_A", "lora_B", "factor")


@dataclass
class Call:
    """The tensors of a call of DoRA; `weight` is what the base product multiplies with."""

    leaves: list[Tensor]
    stored: Tensor
    state: QuantState | None
    weight: Tensor
    dy: Tensor

    def layer(self, bias: Tensor | None, A: Tensor, B: Tensor, p: float = P) -> Layer:
        """The layer that the call is of, around these."""
        return Layer(self.stored, A, B, SCALING, bias, self.state, dropout_p=p, seed=SEED)


def make_layer(
    kind: str, dtype: torch.dtype, adapter_dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> Call:
    M, N, K, R = sizes
    weight = (torch.randn(N, K) / K**0.5).to(dtype)
    stored, state = weight, None
    if kind != "dense":
        stored, state = reference.quantize_4bit(weight, 64, "nf4", kind.endswith("nested"))
        weight = reference.dequantize_4bit(stored, state, dtype)
    A = (torch.randn(R, K) / K**0.5).to(adapter_dtype)
    # An update below the weight's size: factor's gradient sums a product that is rounded with both.
    B = (0.5 * torch.randn(N, R) / R**0.5).to(adapter_dtype)
    factor = torch.rand(N, dtype=torch.float64 if dtype == torch.float64 else FP32) + 0.5
    leaves = [torch.randn(M, K).to(dtype), torch.randn(N).to(dtype), A, B, factor]
    return Call(leaves, stored, state, weight, torch.randn(M, N).to(dtype))


def plain_layer(
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    factor: Tensor,
    p: float = P,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """PEFT's sequence, with the mask that fastlora makes."""
    layer = Layer(weight, A, B, SCALING, bias, dropout_p=p, seed=SEED)
    return reference.plain.dora_linear(x, layer, factor, product_dtype)


def layer_results(
    function: Callable[..., Tensor], layer: Call, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in layer.leaves]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, layer.dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(NAMES, grads, strict=True))}


def run_layer(layer: Call, *leaves: Tensor, backend: str | None = None, p: float = P) -> Tensor:
    x, bias, A, B, factor = leaves
    return dora_linear(x, layer.layer(bias, A, B, p), factor, backend=backend)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("kind", ["dense", "nf4", "nf4 nested"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(FP32, FP32), (BF16, FP32), (BF16, BF16), (torch.float16, FP32)]
)
@pytest.mark.parametrize("sizes", [(9, 70, 67, 2), (37, 66, 131, 5), (130, 96, 128, 16)], ids=str)
def test_layer(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    kind: str,
    p: float,
    backend: str,
) -> None:
    layer = make_layer(kind, dtype, adapter_dtype, sizes)
    with poisoned_memory():
        got = layer_results(lambda *t: run_layer(layer, *t, backend=backend, p=p), layer)
    weight = layer.weight
    exact = layer_results(lambda *t: plain_layer(weight.double(), *t, p=p), layer, torch.float64)
    plain = layer_results(lambda *t: plain_layer(weight, *t, p=p), layer)
    # PEFT takes drop(x) W^T in the adapter's dtype, fastlora in x's: factor's gradient shows it.
    narrow = layer_results(lambda *t: plain_layer(weight, *t, p=p, product_dtype=dtype), layer)
    plain["factor"] = narrow["factor"]
    for name, out in got.items():
        assert out.dtype == plain[name].dtype, name
        assert_close_to_exact(out, exact[name], plain[name], what=name)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize(
    "needed", [*((name,) for name in NAMES), ("x", "factor"), ("lora_A", "bias")]
)
def test_layer_computes_only_what_is_needed(
    needed: tuple[str, ...], p: float, backend: str
) -> None:
    layer = make_layer("nf4", BF16, FP32, (37, 66, 131, 5))
    everything = layer_results(lambda *t: run_layer(layer, *t, backend=backend, p=p), layer)
    leaves = [
        t.clone().requires_grad_(name in needed)
        for name, t in zip(NAMES, layer.leaves, strict=True)
    ]
    run_layer(layer, *leaves, backend=backend, p=p).backward(layer.dy)
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert (leaf.grad is not None) == (name in needed)
        assert leaf.grad is None or torch.equal(leaf.grad, everything[name]), name


@pytest.mark.parametrize("trained", [False, True])
def test_layer_keeps_no_copy_of_x(trained: bool, backend: str) -> None:
    """x itself, and where the magnitude is trained one product, beside what has no M K elements."""
    layer = make_layer("dense", BF16, FP32, (64, 48, 512, 4))
    leaves = [t.clone().requires_grad_() for t in layer.leaves]
    leaves[-1].requires_grad_(trained)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run_layer(layer, *leaves, backend=backend)
    large = [t for t in saved if t.numel() == leaves[0].numel()]
    assert [t.data_ptr() for t in large] == [leaves[0].data_ptr()]
    assert sum(t.shape == layer.dy.shape for t in saved) == trained


def test_a_seed_is_drawn() -> None:
    layer = make_layer("dense", FP32, FP32, (20, 6, 300, 2))
    x, bias, A, B, factor = layer.leaves
    args = (x, layer.layer(bias, A, B)._replace(seed=None), factor)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(dora_linear(*args))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], dora_linear(*args))


@pytest.mark.parametrize("p", [0.0, P])
def test_layer_gradchecks(p: float) -> None:
    layer = make_layer("dense", torch.float64, torch.float64, (6, 4, 5, 2))
    leaves = [t.requires_grad_() for t in layer.leaves]
    function: Callable[..., Any] = lambda *t: run_layer(layer, *t, p=p)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("p", [0.0, P])
def test_gradients_of_gradients(p: float) -> None:
    layer = make_layer("dense", FP32, FP32, (9, 6, 8, 2))
    mine = second_order(lambda *t: run_layer(layer, *t, p=p), layer.leaves)
    usual = second_order(lambda *t: plain_layer(layer.weight, *t, p=p), layer.leaves)
    assert sum(bool(want.abs().max() > 0.1) for want in usual) >= 4
    for got, want in zip(mine, usual, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_a_bias_for_each_token(backend: str) -> None:
    layer = make_layer("dense", BF16, FP32, (37, 66, 131, 5))
    layer.leaves[1] = torch.randn(37, 66).to(BF16)
    got = layer_results(lambda *t: run_layer(layer, *t, backend=backend, p=0.0), layer)
    exact, plain = (
        layer_results(
            lambda x, b, *t, W=W: plain_layer(W, x, None, *t, p=0.0) + b,
            layer,
            dtype,
        )
        for W, dtype in ((layer.weight.double(), torch.float64), (layer.weight, None))
    )
    for name, out in got.items():
        assert_close_to_exact(out, exact[name], plain[name], what=name)


def test_fp32_adapters_keep_their_gradients(backend: str) -> None:
    """Over a bf16 layer, too: to fp32's precision, which a rounded factor * dy does not have."""
    layer = make_layer("dense", BF16, FP32, (150, 96, 128, 8))
    for p in (0.0, P):
        got = layer_results(lambda *t, p=p: run_layer(layer, *t, backend=backend, p=p), layer)
        exact = layer_results(
            lambda *t, p=p: plain_layer(layer.weight.double(), *t, p=p), layer, torch.float64
        )
        for name in ("lora_A", "lora_B"):
            error = (got[name] - exact[name]).abs().max() / exact[name].abs().max()
            assert error < 1e-5, (name, p, float(error))


@pytest.mark.parametrize("storage", [BF16, FP32])
def test_packed_bytes_in_another_storage(storage: torch.dtype, backend: str) -> None:
    """As FSDP wants them: bnb_4bit_quant_storage."""
    packed, state = quantize_4bit(torch.randn(48, 64), 64, "nf4", True)
    A, B = torch.randn(3, 64), torch.randn(48, 3)
    layer = Layer(packed, A, B, SCALING, quant_state=state)
    want = ops.dora_norm(layer, backend=backend)
    stored = layer._replace(weight=packed.view(-1).view(storage))
    assert torch.equal(ops.dora_norm(stored, backend=backend), want)


def test_what_a_backend_has_no_kernel_for_runs_on_the_reference() -> None:
    layer = make_layer("dense", FP32, FP32, (9, 6, 8, 2))
    _, _, A, B, factor = layer.leaves
    assert "no Triton kernel" in (
        BACKENDS["triton"].unsupported(Request("dora_norm", "cuda")) or ""
    )
    adapted = Layer(layer.weight, A, B, SCALING)
    got = ops.dora_norm(adapted, backend="triton")
    assert torch.equal(got, ops.dora_norm(adapted, backend="reference"))
    with use_backend("triton"):
        y = ops.dora_magnitude_fwd(layer.dy, factor, None)
    assert torch.equal(y, ops.dora_magnitude_fwd(layer.dy, factor, None, backend="reference"))
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.dora_norm(adapted, backend="cuda")


def test_layer_takes_a_quant_state_of_bitsandbytes_kind() -> None:
    layer = make_layer("nf4 nested", FP32, FP32, (9, 66, 64, 2))
    want = layer_results(lambda *t: run_layer(layer, *t), layer)
    assert layer.state is not None
    inner = SimpleNamespace(**vars(layer.state.state2))
    state = SimpleNamespace(**{**vars(layer.state), "state2": inner})
    layer.state = state  # type: ignore[assignment]
    for name, out in layer_results(lambda *t: run_layer(layer, *t), layer).items():
        assert torch.equal(out, want[name]), name


def test_layer_refuses_a_bias_of_another_shape() -> None:
    layer = make_layer("dense", FP32, FP32, (9, 6, 8, 2))
    for shape, p in (((5,), 0.0), ((8, 6), 0.0), ((9, 6), P)):
        layer.leaves[1] = torch.randn(shape)
        with pytest.raises(ValueError, match=r"bias must be \[6\]"):
            run_layer(layer, *layer.leaves, p=p)


def test_layer_refuses_a_trained_weight() -> None:
    layer = make_layer("dense", FP32, FP32, (9, 6, 8, 2))
    layer.stored.requires_grad_()
    with pytest.raises(ValueError, match="weight must be frozen"):
        run_layer(layer, *layer.leaves)


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
