"""A backward inside an autocast region gives what it gives outside, for every autograd Function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastlora import grouped_lora_linear, lora_linear
from fastlora.autograd.dora import dora_linear
from fastlora.autograd.shared import gated_mlp, shared_linear
from fastlora.backends import use_backend
from fastlora.integrations.peft.run.adapted_weight import adapted_weight
from fastlora.ops import quantize_4bit
from fastlora.reference import Projection

M, N, K, R, SCALING = 12, 10, 14, 3, 1.5
ENDS = torch.tensor([5, 5, 12])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape) / shape[-1] ** 0.5


def projection(N: int, K: int) -> Projection:
    A, B = (t.requires_grad_() for t in (randn(R, K), randn(N, R)))
    return Projection(randn(N, K), torch.randn(N, requires_grad=True), A, B, SCALING)


def one(x: Tensor, p: Projection) -> Tensor:
    return lora_linear(x, *p[:5], quant_state=p.quant_state)


def four_bit(x: Tensor) -> Tensor:
    p = projection(N, K)
    packed, state = quantize_4bit(p.weight)
    return one(x, p._replace(weight=packed, quant_state=state))


def experts(transposed: bool) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        A, B = (t.requires_grad_() for t in (randn(3, R, K), randn(3, N, R)))
        weight = randn(3, K, N) if transposed else randn(3, N, K)
        return grouped_lora_linear(x, weight, ENDS, A, B, SCALING, transposed=transposed)

    return run


def whole_weight(x: Tensor) -> Tensor:
    left, right = (t.requires_grad_() for t in (randn(K, R), randn(R, K)))
    return x * adapted_weight(randn(K, K), left, right, SCALING, []).square().sum()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: one(x, projection(N, K)),
    "4-bit": four_bit,
    "shared input": lambda x: torch.cat(
        shared_linear(x, [projection(N, K), projection(N + 3, K)]), 1
    ),
    "gated MLP": lambda x: gated_mlp(
        x, projection(N, K), projection(N, K), projection(K, N), "silu"
    ),
    "experts": experts(transposed=False),
    "experts, transposed": experts(transposed=True),
    "DoRA": lambda x: dora_linear(x, *projection(N, K)[:5], torch.rand(N, requires_grad=True)),
    "DoRA with dropout": lambda x: dora_linear(
        x, *projection(N, K)[:5], torch.rand(N, requires_grad=True), dropout_p=0.3
    ),
    "an adapted weight as a whole": whole_weight,
}


def leaves(node: object, seen: dict[int, Tensor]) -> dict[int, Tensor]:
    """The tensors with gradients that a graph begins at, in the order in which it names them."""
    for following, _ in getattr(node, "next_functions", ()):
        variable = getattr(following, "variable", None)
        if variable is not None:
            seen[id(variable)] = variable
        leaves(following, seen)
    return seen


# A gated MLP can't be differentiated twice.
TWICE = [name for name in FUNCTIONS if name != "gated MLP"]


@pytest.mark.parametrize(
    ("name", "create_graph"),
    [*((name, False) for name in FUNCTIONS), *((name, True) for name in TWICE)],
)
def test_same_gradients(name: str, create_graph: bool) -> None:
    x = torch.randn(M, K, requires_grad=True)
    with use_backend("reference"):
        y = FUNCTIONS[name](x)
    inputs = list(leaves(y.grad_fn, {}).values())
    assert len(inputs) > 1
    dy = torch.randn_like(y)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            y, inputs, dy, retain_graph=True, create_graph=create_graph, allow_unused=True
        )

    outside = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients()
    for got, want in zip(inside, outside, strict=True):
        assert want.any() and got.dtype == want.dtype
        assert torch.equal(got, want)
