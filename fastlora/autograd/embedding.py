"""The differentiable layer of an embedding: `lora_embedding`. Contains no math."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..layer import Layer
from .common import (
    Saved,
    autocast_off,
    check_arguments,
    check_frozen,
    run_backward,
    settled,
    wants_gradient,
)


class LoraEmbeddingFunction(torch.autograd.Function):
    """`y[m] = weight_scale * weight[id] + scaling * A[:, id] B^T`, with gradients for lora_A and
    lora_B, each only where asked for.

    Saves ids and the adapters. The formulas are those of `reference`. A double backward
    runs in plain torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        layer: Layer,
        backend: str | None,
        bias: None,
        lora_A: Tensor,
        lora_B: Tensor,
        weight_scale: float,
        padding_idx: int | None,
    ) -> Tensor:
        # The backward doesn't read the table, and ids take its place.
        ctx.saved = Saved(ctx, (), (layer._replace(weight=ids),), backend)
        ctx.padding_idx = padding_idx
        return ops.lora_embedding_fwd(ids, layer, weight_scale, backend=backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, (layer,) = ctx.saved.restore(ctx)
        ids = layer.weight
        (need,) = ctx.saved.needs(ctx, 3)
        grads = run_backward(
            dy.device,
            lambda: ops.lora_embedding_bwd(
                dy, ids, layer, ctx.padding_idx, need, backend=ctx.saved.backend
            ),
            # The reference consists of torch's differentiable operations.
            lambda: ops.lora_embedding_bwd(
                dy, ids, layer, ctx.padding_idx, need, backend="reference"
            ),
        )
        return None, None, None, *ctx.saved.gradients((grads,)), None, None


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    weight_scale: float = 1.0,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`y[m] = weight_scale * weight[id] + scaling * A[:, id] B^T`, differentiable in A and B.

    Args:
        ids: any shape, int64 or int32, 0 <= id < V.
        weight: [V, N], fp32, bf16 or fp16. Frozen.
        lora_A: [R, V], fp32 or weight's dtype. fp32 adapters get fp32 gradients.
        lora_B: [N, R], lora_A's dtype.
        scaling: factor of the LoRA term.
        weight_scale: factor of the table's rows. PEFT multiplies the LoRA term by it, too: then it
            belongs in `scaling` as well.
        padding_idx: the id whose column of lora_A gets no gradient; from the end if negative.
        backend: "native" or "reference"; the device's best when None.

    Autocast changes nothing, as for torch.nn.functional.embedding: the result has weight's dtype.

    Returns:
        y [..., N] in weight's dtype.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit; weight requires a gradient.
        RuntimeError, IndexError: an id is outside of the table; the backend asked for can't run.
    """
    check_arguments(ids, scaling, "ids")
    check_frozen(weight)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    if padding_idx is not None:
        V = len(weight)
        if not -V <= padding_idx < V:
            raise ValueError(f"padding_idx must be from {-V} to {V - 1}, got {padding_idx}")
        padding_idx %= V
    backend = settled(backend)
    flat, layer = ids.reshape(-1).long(), Layer(weight, lora_A, lora_B, scaling)
    with autocast_off(ids.device):
        if wants_gradient(lora_A, lora_B):
            tensors = (None, lora_A, lora_B)
            y = LoraEmbeddingFunction.apply(
                flat, layer, backend, *tensors, weight_scale, padding_idx
            )
        else:
            y = ops.lora_embedding_fwd(flat, layer, weight_scale, backend=backend)
    return y.view(*ids.shape, y.shape[-1])
