"""The differentiable layer: `lora_linear` and its autograd Function. Contains no math."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..layer import Grads, Layer
from ..reference.precision import sum_dtype
from .common import (
    Saved,
    as_matrix,
    autocast_dtype,
    autocast_off,
    check_arguments,
    differentiable_bwd,
    prepared_layer,
    run_backward,
    settled,
    wants_gradient,
    working,
)


class LoraLinearFunction(torch.autograd.Function):
    """`y = x W^T + bias + scaling * drop(x) A^T B^T`, W dense or 4-bit, with gradients for x, bias,
    lora_A and lora_B, each only where asked for.

    Saves x, S = drop(x) A^T [M, R], the adapters and the dropout seed: no mask, no copy of x. The
    formulas are those of `reference.lora_linear_fwd` and `reference.lora_linear_bwd`. A double
    backward (`create_graph=True`) runs in plain torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: Layer,
        backend: str | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
    ) -> Tensor:
        y, S = ops.lora_linear_fwd(x, working(layer), backend=backend)
        ctx.saved = Saved(ctx, (x, S), (layer,), backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, S), (layer,) = ctx.saved.restore(ctx)
        (need,) = ctx.saved.needs(ctx, 3)

        def plain() -> Grads:
            dx, (grads,) = differentiable_bwd(_plain, dy, x, [layer], [need])
            return grads._replace(x=dx, bias=dy.sum(0, dtype=sum_dtype(dy)) if need.bias else None)

        grads = run_backward(
            dy.device,
            lambda: ops.lora_linear_bwd(dy, x, working(layer), S, need, backend=ctx.saved.backend),
            plain,
        )
        return grads.x, None, None, *ctx.saved.gradients((grads,))


def _plain(x: Tensor, layers: list[Layer]) -> Tensor:
    y, _ = ops.lora_linear_fwd(x, layers[0], backend="reference")
    return y


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    quant_state: Any = None,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`y = x W^T + bias + scaling * drop(x) A^T B^T`, differentiable in x, bias, lora_A, lora_B.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: [N, K] in x's dtype, or packed 4-bit bytes when quant_state is given. Frozen.
            The transpose of a contiguous [K, N] is read as it is.
        bias: [N] or None.
        lora_A: [R, K], fp32 or x's dtype. fp32 adapters get fp32 gradients.
        lora_B: [N, R], lora_A's dtype.
        scaling: factor of the LoRA term, lora_alpha / r in PEFT (rsLoRA: lora_alpha / sqrt(r)).
        quant_state: fastlora's or bitsandbytes' QuantState of a 4-bit weight.
        compute_dtype: of a 4-bit base product, as bitsandbytes' Linear4bit; x's dtype when None.
            A dense weight is cast to it, in the forward and again in the backward, which keeps none
            of the copies.
        dropout_p: probability of dropping an element of x on the LoRA path.
        training: False switches dropout off.
        seed: int64, one element, the dropout's key. Drawn with torch.randint when None, so that
            torch.manual_seed and activation checkpointing replay the same mask.
        backend: "native", "triton" or "reference"; the device's best when None.

    Under autocast x, the adapters, the bias and a dense weight are cast to autocast's dtype, as
    torch.nn.functional.linear does.

    Returns:
        y [..., N] in x's dtype (autocast's dtype under autocast).

    Raises:
        ValueError, TypeError: a shape or dtype does not fit; weight requires a gradient.
        RuntimeError: the backend asked for can't run here; the message says why.
    """
    check_arguments(x, scaling)
    p = dropout_p if training else 0.0
    layer = Layer(weight, lora_A, lora_B, scaling, bias, quant_state, compute_dtype, p, seed)
    return linear(x, layer, backend=backend)


def linear(x: Tensor, layer: Layer, *, backend: str | None = None) -> Tensor:
    """`lora_linear` on a layer's fields."""
    # As `prepared`, for one layer: a short call spends its time in Python.
    dtype = autocast_dtype(x)
    layer, backend = prepared_layer(x, layer, dtype), settled(backend)
    if dtype is None:
        return _linear(x, layer, backend)
    with autocast_off(x.device):
        return _linear(x.to(dtype), layer, backend)


def _linear(x: Tensor, layer: Layer, backend: str) -> Tensor:
    rows = as_matrix(x)
    bias, A, B = layer.bias, layer.lora_A, layer.lora_B
    if wants_gradient(x, bias, A, B):
        y = LoraLinearFunction.apply(rows, layer, backend, bias, A, B)
    else:
        y, _ = ops.lora_linear_fwd(rows, working(layer), backend=backend)
    return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])
