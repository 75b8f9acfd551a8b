"""Gradients of gradients: every autograd Function beside the same formula in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora import grouped_lora_linear, lora_linear, reference
from fastlora.layer import Layer
from tests.second_order import Run, second_order

M, N, K, R, SCALING, P = 12, 10, 14, 3, 1.5, 0.25
SEED = torch.tensor([5])
ENDS = torch.tensor([5, 5, 12])


def plain(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, p: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    layer = Layer(W, A, B, SCALING, bias, dropout_p=p, seed=SEED)
    return reference.plain.lora_linear(x, layer)


def check(run: Run, same: Run, *tensors: Tensor) -> None:
    for got, want in zip(second_order(run, tensors), second_order(same, tensors), strict=True):
        largest = want.abs().max()
        assert largest > 0.1
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(largest))


def test_a_layer_that_is_called_again() -> None:
    """Its second input depends on A and B, whose gradients count each path once."""
    W = randn(K, K)

    def twice(layer: Run) -> Run:
        return lambda x, A, B: layer(layer(x, A, B).tanh(), A, B)

    check(
        twice(lambda x, A, B: lora_linear(x, W, None, A, B, SCALING)),
        twice(lambda x, A, B: plain(x, W, A, B)),
        *(torch.randn(M, K), randn(R, K), randn(K, R)),
    )


def test_a_hook_runs_once() -> None:
    A, B = randn(R, K).requires_grad_(), randn(N, R).requires_grad_()
    x, W = torch.randn(M, K), randn(N, K)
    y = lora_linear(x, W, None, A, B, SCALING).sin().sum()
    (before,) = torch.autograd.grad(y, A, retain_graph=True)
    A.register_hook(lambda grad: 2 * grad)
    (after,) = torch.autograd.grad(y, A, create_graph=True)
    torch.testing.assert_close(after, 2 * before)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape) / shape[-1] ** 0.5


@pytest.mark.parametrize("p", [0.0, P])
def test_one_layer(p: float) -> None:
    W, bias = randn(N, K), torch.randn(N)
    check(
        lambda x, A, B, b: lora_linear(x, W, b, A, B, SCALING, dropout_p=p, seed=SEED),
        lambda x, A, B, b: plain(x, W, A, B, p, b),
        *(torch.randn(M, K), randn(R, K), randn(N, R), bias),
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed: bool) -> None:
    W = randn(3, N, K)
    stored = W.mT.contiguous() if transposed else W

    def experts(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return reference.plain.grouped_lora_linear(x, Layer(W, A, B, SCALING, offsets=ENDS))

    check(
        lambda x, A, B: grouped_lora_linear(x, stored, ENDS, A, B, SCALING, transposed=transposed),
        experts,
        *(torch.randn(M, K), randn(3, R, K), randn(3, N, R)),
    )
