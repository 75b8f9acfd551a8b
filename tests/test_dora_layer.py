"""DoRA's layers under torch's autograd, against PEFT's sequence."""

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
from fastlora.layer import Layer
from fastlora.quant import QuantState
from tests.conftest import poisoned_memory
from tests.second_order import second_order
from tests.tolerance import assert_close_to_exact

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SCALING, SEED, P = 0.7, torch.tensor([-12345]), 0.3


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := BACKENDS[request.param].unsupported(Request("dora_norm", "cpu")):
        pytest.skip(reason)
    return request.param


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
) -> Tensor:
    """PEFT's sequence, with the mask that fastlora makes."""
    layer = Layer(weight, A, B, SCALING, bias, dropout_p=p, seed=SEED)
    return reference.plain.dora_linear(x, layer, factor)


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
