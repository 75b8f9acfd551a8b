"""Gradients of gradients of a function, to hold one function to another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[..., Tensor | Sequence[Tensor]]


def second_order(run: Run, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the squared gradients of a function that is not quadratic."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    result = run(*leaves)
    ys = [result] if isinstance(result, Tensor) else result
    first = torch.autograd.grad(sum(y.sin().sum() for y in ys), leaves, create_graph=True)
    squares = sum((i + 1) * g.square().sum() for i, g in enumerate(first))
    return list(torch.autograd.grad(squares, leaves))
