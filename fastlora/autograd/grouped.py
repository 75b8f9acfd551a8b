"""The differentiable layers of a stack of experts: `grouped_lora_linear`. Contains no math."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..layer import Grads, Layer, Needs
from .common import (
    Saved,
    autocast_off,
    check_arguments,
    differentiable_bwd,
    prepared,
    run_backward,
    working,
)


class GroupedLoraLinearFunction(torch.autograd.Function):
    """`y[m] = x[m] W[e]^T + scaling * drop(x)[m] A[e]^T B[e]^T`, `e` the expert of row m, with
    gradients for x, lora_A and lora_B, each only where asked for.

    Saves x, S and the adapters. The formulas are those of `reference.grouped_lora_linear_fwd` and
    `reference.grouped_lora_linear_bwd`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: Layer,
        backend: str | None,
        bias: None,
        lora_A: Tensor,
        lora_B: Tensor,
    ) -> Tensor:
        y, S = ops.grouped_lora_linear_fwd(x, working(layer), backend=backend)
        ctx.saved = Saved(ctx, (x, S), (layer,), backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, S), (layer,) = ctx.saved.restore(ctx)
        (need,) = ctx.saved.needs(ctx, 3)
        grads = run_backward(
            dy.device,
            lambda: ops.grouped_lora_linear_bwd(
                dy, x, working(layer), S, need, backend=ctx.saved.backend
            ),
            lambda: _plain_bwd(
                lambda x, own: ops.grouped_lora_linear_fwd(x, own, backend="reference")[0],
                dy,
                x,
                layer,
                need,
            ),
        )
        return grads.x, None, None, *ctx.saved.gradients((grads,))


class TransposedLoraLinearFunction(torch.autograd.Function):
    """`y[m] = x[m] V[e] + scaling * x[m] A[e]^T B[e]^T`: the experts are stored as `V [E, K, N]`.

    The layer with V as its weight, B^T as its lora_A and A^T as its lora_B has this y as its dx. So
    the ops change places: the forward is that layer's backward for `dy = x`, and the backward is
    its forward on dy, then its dA and dB, which are the transposes of our dB and dA. Saves x alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: Layer,
        backend: str | None,
        bias: None,
        lora_A: Tensor,
        lora_B: Tensor,
    ) -> Tensor:
        ctx.saved = Saved(ctx, (x,), (layer,), backend)
        return _transposed_fwd(x, layer, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (layer,) = ctx.saved.restore(ctx)
        (need,) = ctx.saved.needs(ctx, 3)

        def kernels() -> Grads:
            backend, mirrored = ctx.saved.backend, _mirrored(layer)
            dx, S = ops.grouped_lora_linear_fwd(dy, mirrored, backend=backend)
            grads, asked = Grads(), Needs(False, need.B, need.A)
            if any(asked):
                grads = ops.grouped_lora_linear_bwd(x, dy, mirrored, S, asked, backend=backend)
            dA, dB = (None if t is None else t.mT for t in (grads.B, grads.A))
            return Grads(dx if need.x else None, dA, dB)

        grads = run_backward(
            dy.device,
            kernels,
            lambda: _plain_bwd(
                lambda x, own: _transposed_fwd(x, own, "reference"), dy, x, layer, need
            ),
        )
        return grads.x, None, None, *ctx.saved.gradients((grads,))


def _mirrored(layer: Layer) -> Layer:
    """The layer whose dx is the y of one that is stored transposed."""
    A, B = layer.lora_B.mT.contiguous(), layer.lora_A.mT.contiguous()
    return working(layer)._replace(lora_A=A, lora_B=B)


def _transposed_fwd(x: Tensor, layer: Layer, backend: str | None) -> Tensor:
    """y of a stack that is stored transposed, by the backward op."""
    needs = Needs(True, False, False)
    grads = ops.grouped_lora_linear_bwd(x, None, _mirrored(layer), None, needs, backend=backend)
    assert grads.x is not None
    return grads.x


def _plain_bwd(
    forward: Callable[[Tensor, Layer], Tensor], dy: Tensor, x: Tensor, layer: Layer, need: Needs
) -> Grads:
    dx, (grads,) = differentiable_bwd(lambda x, own: forward(x, own[0]), dy, x, (layer,), (need,))
    return grads._replace(x=dx)


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    quant_state: Any = None,
    compute_dtype: torch.dtype | None = None,
    transposed: bool = False,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`y[m] = x[m] W[e]^T + scaling * drop(x)[m] A[e]^T B[e]^T`, `e` the expert of row m.

    `offsets[e - 1] <= m < offsets[e]`. Differentiable in x, lora_A and lora_B.

    Args:
        x: [M, K], fp32, bf16 or fp16, rows sorted by expert.
        weight: [E, N, K] in x's dtype, [E, K, N] when transposed, or the stack's packed 4-bit bytes
            when quant_state is given. Frozen.
        offsets: [E], int32 or int64: where the rows of each expert end, as torch's grouped_mm takes
            them. Rows from offsets[-1] on give zeros.
        lora_A: [E, R, K], fp32 or x's dtype. fp32 adapters get fp32 gradients.
        lora_B: [E, N, R], lora_A's dtype.
        scaling: factor of the LoRA term.
        quant_state: fastlora's or bitsandbytes' QuantState of a 4-bit stack.
        compute_dtype: of a 4-bit base product; x's dtype when None.
        transposed: the experts are stored as [E, K, N], for `x W[e]` without a transpose.
        dropout_p: probability of dropping an element of x on the LoRA path.
        training: False switches dropout off.
        seed: int64, one element, the dropout's key; drawn with torch.randint when None.
        backend: "native", "triton" or "reference"; the device's best when None.

    Under autocast x, the adapters and a dense weight are cast to autocast's dtype.

    Returns:
        y [M, N] in x's dtype (autocast's dtype under autocast).

    Raises:
        ValueError, TypeError: a shape, dtype or the offsets do not fit; weight requires a gradient;
            dropout on transposed experts, for which no kernel has a mask.
        RuntimeError: the backend asked for can't run here; the message says why.
    """
    check_arguments(x, scaling)
    p = dropout_p if training else 0.0
    if transposed and p > 0.0:
        raise ValueError(f"dropout_p must be 0 for transposed experts, got {p}")
    fields = (None, quant_state, compute_dtype, p, seed, offsets)
    x, (layer,), backend = prepared(x, (Layer(weight, lora_A, lora_B, scaling, *fields),), backend)
    function = TransposedLoraLinearFunction if transposed else GroupedLoraLinearFunction
    with autocast_off(x.device):
        return function.apply(x, layer, backend, None, layer.lora_A, layer.lora_B)
