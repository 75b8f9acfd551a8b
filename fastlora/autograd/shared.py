"""Several LoRA linears of one input as one autograd node. Contains no math."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..layer import Grads, Layer, Needs
from ..reference.precision import sum_dtype
from .common import (
    Saved,
    as_matrix,
    autocast_off,
    differentiable,
    differentiable_gradients,
    prepared,
    run_backward,
    wants_gradient,
    working,
)


class SharedLinearFunction(torch.autograd.Function):
    """`reference.shared_linear_fwd` with gradients for x and each bias, lora_A and lora_B.

    Saves x once, each S [M, R], the adapters and the dropout seeds. A double backward runs in plain
    torch.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Layer], backend: str | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, Ss = ops.shared_linear_fwd(x, [working(p) for p in layers], backend=backend)
        ctx.saved = Saved(ctx, (x, *Ss), layers, backend)
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, *Ss), layers = ctx.saved.restore(ctx)
        needs = ctx.saved.needs(ctx, 3)
        dx, grads = run_backward(
            x.device,
            lambda: ops.shared_linear_bwd(
                dys, x, [working(p) for p in layers], Ss, needs, backend=ctx.saved.backend
            ),
            lambda: differentiable_bwd(dys, x, layers, needs),
        )
        return dx, None, None, *ctx.saved.gradients(grads)


def differentiable_bwd(
    dys: Sequence[Tensor | None], x: Tensor, layers: Sequence[Layer], needs: Sequence[Needs]
) -> tuple[Tensor | None, tuple[Grads, ...]]:
    """`ops.shared_linear_bwd` with a graph, in plain torch."""
    given = [i for i, dy in enumerate(dys) if dy is not None]

    def run(x: Tensor, *adapters: Tensor) -> list[Tensor]:
        pairs = zip(adapters[::2], adapters[1::2], strict=True)
        own = [
            working(p)._replace(lora_A=A, lora_B=B, bias=None)
            for p, (A, B) in zip(layers, pairs, strict=True)
        ]
        ys, _ = ops.shared_linear_fwd(x, own, backend="reference")
        return [ys[i] for i in given]

    inputs = [x, *(t for p in layers for t in (p.lora_A, p.lora_B))]
    flags = [needs[0].x, *(flag for need in needs for flag in (need.A, need.B))]
    some = [dy for dy in dys if dy is not None]
    dx, *flat = differentiable_gradients(run, inputs, flags, some)
    grads = [
        Grads(
            None,
            flat[2 * i],
            flat[2 * i + 1],
            dy.sum(0, dtype=sum_dtype(dy)) if need.bias and dy is not None else None,
        )
        for i, (dy, need) in enumerate(zip(dys, needs, strict=True))
    ]
    return dx, tuple(grads)


def shared_linear(
    x: Tensor, layers: Sequence[Layer], *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """`y_i = x W_i^T + bias_i + scaling_i * drop_i(x) A_i^T B_i^T` for each i, as one node.

    x is saved once for all gradients, and dx is summed in fp32 and rounded once.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        layers: see `Layer`; all dense or all 4-bit, with the same dtypes, with frozen weights. A
            seed that dropout needs and lacks is drawn, in the order of the layers.
        backend: "native", "triton" or "reference"; the device's best when None.

    Under autocast as `lora_linear`.

    Returns:
        Each y_i [..., N_i] in x's dtype (autocast's dtype under autocast).

    Raises:
        ValueError, TypeError: a shape or dtype does not fit; a weight requires a gradient.
        RuntimeError: the backend asked for can't run here; the message says why.
    """
    x, layers, backend = prepared(x, layers, backend)
    rows, tensors = as_matrix(x), differentiable(layers)
    with autocast_off(x.device):
        if wants_gradient(x, *tensors):
            ys = SharedLinearFunction.apply(rows, layers, backend, *tensors)
        else:
            ys, _ = ops.shared_linear_fwd(rows, [working(p) for p in layers], backend=backend)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)
