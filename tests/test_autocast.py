"""Autocast behaves alike in every public function, and a backward does not care for its region."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora import grouped_lora_linear, lora_embedding, lora_linear
from fastlora.autograd.dora import dora_linear
from fastlora.autograd.gated import gated_mlp
from fastlora.backends import BACKENDS
from fastlora.backends.contract import Request
from fastlora.integrations.peft.run.adapted_weight import adapted_weight
from fastlora.layer import Layer
from fastlora.ops import quantize_4bit

M, N, K, R, SCALING = 12, 10, 14, 3, 1.5
ENDS = torch.tensor([5, 5, 12])
BF16 = torch.bfloat16

Cast = Callable[[Tensor], Tensor]


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := BACKENDS[request.param].unsupported(Request("lora_linear_fwd", "cpu")):
        pytest.skip(reason)
    return request.param


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape) / shape[-1] ** 0.5


def trained(*shape: int) -> Tensor:
    return randn(*shape).requires_grad_()


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def to_bf16(tensor: Tensor) -> Tensor:
    return tensor.to(BF16)


@dataclass
class Call:
    """One call of a function on fp32 tensors: `others` are leaves that autocast leaves alone."""

    function: Callable[..., Tensor]
    layers: list[Layer]
    others: list[Tensor] = field(default_factory=list)
    x: Tensor = field(default_factory=lambda: torch.randn(M, K, requires_grad=True))

    @property
    def leaves(self) -> list[Tensor]:
        fields = [t for layer in self.layers for t in (layer.bias, layer.lora_A, layer.lora_B)]
        return [self.x, *(t for t in fields if t is not None), *self.others]

    def run(self, backend: str, cast: Cast = as_it_is) -> Tensor:
        """The result, all that autocast casts having gone through `cast` first."""
        layers = [
            layer._replace(
                weight=layer.weight if layer.quant_state is not None else cast(layer.weight),
                bias=None if layer.bias is None else cast(layer.bias),
                lora_A=cast(layer.lora_A),
                lora_B=cast(layer.lora_B),
            )
            for layer in self.layers
        ]
        return self.function(cast(self.x), *layers, *self.others, backend=backend)


def layer(N: int, K: int, four_bit: bool, **options: Any) -> Layer:
    weight, state = randn(N, K), None
    if four_bit:
        weight, state = quantize_4bit(weight)
    bias, A, B = torch.randn(N, requires_grad=True), trained(R, K), trained(N, R)
    return Layer(weight, A, B, SCALING, bias, state, **options)


def dropping(four_bit: bool) -> Layer:
    return layer(N, K, four_bit, dropout_p=0.3, seed=torch.tensor([5]))


def linear(x: Tensor, p: Layer, backend: str) -> Tensor:
    return lora_linear(
        x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling, quant_state=p.quant_state,
        dropout_p=p.dropout_p, seed=p.seed, backend=backend,
    )  # fmt: skip


def mlp(x: Tensor, *layers: Layer, backend: str) -> Tensor:
    return gated_mlp(x, *layers, "silu", backend=backend)


def experts(transposed: bool, four_bit: bool) -> Call:
    shape = (K, 16) if transposed else (16, K)
    weight, state = randn(3, *shape), None
    if four_bit:
        weight, state = quantize_4bit(weight, 32)
    stack = Layer(weight, trained(3, R, K), trained(3, 16, R), SCALING, None, state)

    def run(x: Tensor, p: Layer, backend: str) -> Tensor:
        return grouped_lora_linear(
            x, p.weight, ENDS, p.lora_A, p.lora_B, p.scaling, quant_state=p.quant_state,
            transposed=transposed, backend=backend,
        )  # fmt: skip

    return Call(run, [stack])


def factor() -> Tensor:
    return torch.rand(N, requires_grad=True)


CALLS: dict[str, Callable[[bool], Call]] = {
    "a layer": lambda q: Call(linear, [layer(N, K, q)]),
    "a layer with dropout": lambda q: Call(linear, [dropping(q)]),
    "gated MLP": lambda q: Call(mlp, [layer(N, K, q), layer(N, K, q), layer(K, N, q)]),
    "experts": lambda q: experts(transposed=False, four_bit=q),
    "experts, transposed": lambda q: experts(transposed=True, four_bit=q),
    "DoRA": lambda q: Call(dora_linear, [layer(N, K, q)], [factor()]),
    "DoRA with dropout": lambda q: Call(dora_linear, [dropping(q)], [factor()]),
}


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4-bit"])
@pytest.mark.parametrize("name", CALLS)
def test_casts_alike(name: str, four_bit: bool, inside: bool, backend: str) -> None:
    """As a call outside on what autocast would have cast; in bf16, bit by bit."""
    call = CALLS[name](four_bit)
    with torch.autocast("cpu", BF16):
        y = call.run(backend)
    want = call.run(backend, to_bf16)
    assert y.dtype == BF16 and torch.equal(y, want)
    dy = torch.randn_like(y)
    with torch.autocast("cpu", BF16, enabled=inside):
        grads = torch.autograd.grad(y, call.leaves, dy)
    wanted = torch.autograd.grad(want, call.leaves, dy)
    for leaf, got, grad in zip(call.leaves, grads, wanted, strict=True):
        assert got.dtype == leaf.dtype == torch.float32 and got.any()
        assert torch.equal(got, grad)


@pytest.mark.parametrize("name", CALLS)
def test_casts_where_nothing_needs_a_gradient(name: str, backend: str) -> None:
    call = CALLS[name](False)
    with torch.no_grad():
        with torch.autocast("cpu", BF16):
            y = call.run(backend)
        assert y.dtype == BF16 and torch.equal(y, call.run(backend, to_bf16))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_an_embedding_keeps_its_tables_dtype(dtype: torch.dtype, backend: str) -> None:
    ids, table = torch.tensor([1, 4, 4, 0]), randn(6, N).to(dtype)
    A, B = trained(R, 6), trained(N, R)
    dy = torch.randn(4, N).to(dtype)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", BF16, enabled=enabled):
            y = lora_embedding(ids, table, A, B, SCALING, backend=backend)
            assert y.dtype == F.embedding(ids, table).dtype == dtype
        results.append((y, *torch.autograd.grad(y, (A, B), dy)))
    for outside, inside in zip(*results, strict=True):
        assert outside.any() and torch.equal(outside, inside)


# ---- a backward inside a region that its forward was outside of ---------------------------------


def whole_weight(x: Tensor, left: Tensor, right: Tensor, backend: str) -> Tensor:
    return x * adapted_weight(randn(K, K), left, right, SCALING, []).square().sum()


BACKWARDS = {
    **{f"{name}, dense": lambda name=name: CALLS[name](False) for name in CALLS},
    **{f"{name}, 4-bit": lambda name=name: CALLS[name](True) for name in CALLS},
    "an adapted weight as a whole": lambda: Call(whole_weight, [], [trained(K, R), trained(R, K)]),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", BACKWARDS)
def test_same_gradients(name: str, create_graph: bool) -> None:
    call = BACKWARDS[name]()
    y = call.run("reference")
    dy = torch.randn_like(y)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, call.leaves, dy, retain_graph=True, create_graph=create_graph)

    outside = gradients()
    with torch.autocast("cpu", BF16):
        inside = gradients()
    for got, want in zip(inside, outside, strict=True):
        assert want.any() and got.dtype == want.dtype
        assert torch.equal(got, want)
