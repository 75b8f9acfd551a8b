"""LoRA on an embedding. Sizes: M tokens, V rows of the table, N columns, R rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from .precision import sum_dtype


def lora_embedding_fwd(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    weight_scale: float = 1.0,
) -> Tensor:
    """`S[m] = A[:, ids[m]]`, `y[m] = weight_scale * weight[ids[m]] + scaling * S[m] B^T`.

    Args:
        ids: [M], int64, 0 <= id < V.
        weight: [V, N], fp32, bf16 or fp16. Frozen.
        lora_A: [R, V], fp32 or weight's dtype.
        lora_B: [N, R], lora_A's dtype.
        scaling: factor of the LoRA term.
        weight_scale: factor of the table's rows.

    Returns:
        y [M, N] in weight's dtype, rounded once.

    Source: PEFT's `lora.Embedding`, whose two parameters have these shapes.
    """
    acc = sum_dtype(weight)
    S = lora_A.to(acc).T[ids]
    return (weight_scale * weight[ids].to(acc) + scaling * (S @ lora_B.to(acc).T)).to(weight.dtype)


def lora_embedding_bwd(
    dy: Tensor,
    ids: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """`dS = scaling * dy B`, `dA[:, v] = sum of dS[m] over ids[m] = v`, `dB = scaling * dy^T S`.

    Differentiable in dy, lora_A and lora_B, for gradients of gradients.

    Args:
        dy: [M, N], in the dtype of `lora_embedding_fwd`'s y.
        ids, lora_A, lora_B, scaling: those of `lora_embedding_fwd`.
        padding_idx: the id whose column of A gets no gradient, as in `nn.Embedding`.
        needs: whether dA and dB are wanted.

    Returns:
        dA [R, V] and dB [N, R] in lora_A's dtype, None where not wanted.
    """
    acc = sum_dtype(dy)
    wide = dy.to(acc)
    dA: Tensor | None = None
    dB: Tensor | None = None
    if needs[0]:
        kept = ids >= 0 if padding_idx is None else ids != padding_idx
        dS = scaling * (wide @ lora_B.to(acc))
        dS = torch.where(kept[:, None], dS, 0.0)
        dA = dS.new_zeros(lora_A.shape[::-1]).index_add(0, ids, dS).T.to(lora_A.dtype)
    if needs[1]:
        # torch's own gather stops the gradient of a gradient, too, at padding_idx.
        S = embedding(ids, lora_A.to(acc).T, padding_idx)
        dB = (scaling * (wide.T @ S)).to(lora_B.dtype)
    return dA, dB
