"""The differentiable layer of an embedding: `lora_embedding`. No math stands here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import forced_backend
from .linear import autocast_off, check_frozen


class LoraEmbeddingFunction(torch.autograd.Function):
    """`y[m] = weight_scale * weight[id] + scaling * A[:, id] B^T`, with gradients for lora_A and
    lora_B, each only where asked for.

    Saves ids and the adapters. The formulas are those of `reference`. A backward that is
    differentiated itself (`create_graph=True`) runs in plain torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        weight_scale: float,
        padding_idx: int | None,
        backend: str | None,
    ) -> Tensor:
        ctx.save_for_backward(ids, lora_A, lora_B)
        ctx.options = (scaling, padding_idx)
        ctx.backend = backend
        return ops.lora_embedding_fwd(
            ids, weight, lora_A, lora_B, scaling, weight_scale, backend=backend
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # The reference is made of torch's differentiable operations.
        backend = "reference" if torch.is_grad_enabled() else ctx.backend
        ids, lora_A, lora_B = ctx.saved_tensors
        scaling, padding_idx = ctx.options
        needs = ctx.needs_input_grad[2:4]
        with autocast_off(dy.device):
            dA, dB = ops.lora_embedding_bwd(
                dy, ids, lora_A, lora_B, scaling, padding_idx, needs, backend=backend
            )
        return None, None, dA, dB, None, None, None, None


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

    Autocast changes nothing: a table is no operand of a product, and A and B are read as they are.

    Returns:
        y [..., N] in weight's dtype.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit; weight requires a gradient.
        RuntimeError, IndexError: an id lies outside of the table; the backend asked for can't run.
    """
    check_frozen(weight)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    if padding_idx is not None:
        V = len(weight)
        if not -V <= padding_idx < V:
            raise ValueError(f"padding_idx must be from {-V} to {V - 1}, got {padding_idx}")
        padding_idx %= V
    # The backend is settled now: the backward may run outside of a `use_backend` block.
    backend = forced_backend(backend)
    args = (ids.reshape(-1).long(), weight, lora_A, lora_B, scaling, weight_scale)
    with autocast_off(ids.device):
        if torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad):
            y = LoraEmbeddingFunction.apply(*args, padding_idx, backend)
        else:
            y = ops.lora_embedding_fwd(*args, backend=backend)
    return y.view(*ids.shape, y.shape[-1])
