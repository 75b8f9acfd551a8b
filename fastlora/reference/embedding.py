"""LoRA on an embedding. Sizes: M tokens, V rows of the table, N columns, R rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..layer import Grads, Layer, Needs
from .precision import sum_dtype


def lora_embedding_fwd(ids: Tensor, layer: Layer, weight_scale: float = 1.0) -> Tensor:
    """`S[m] = A[:, ids[m]]`, `y[m] = weight_scale * weight[ids[m]] + scaling * S[m] B^T`.

    Args:
        ids: [M], int64, 0 <= id < V.
        layer: weight [V, N], fp32, bf16 or fp16, frozen; lora_A [R, V], fp32 or weight's dtype;
            lora_B [N, R]; scaling.
        weight_scale: factor of the table's rows.

    Returns:
        y [M, N] in weight's dtype, rounded once.

    Source: PEFT's `lora.Embedding`, whose two parameters have these shapes.
    """
    table = layer.weight
    acc = sum_dtype(table)
    S = embedding(ids, layer.lora_A.to(acc).T)
    term = layer.scaling * (S @ layer.lora_B.to(acc).T)
    return (weight_scale * embedding(ids, table).to(acc) + term).to(table.dtype)


def lora_embedding_bwd(
    dy: Tensor,
    ids: Tensor,
    layer: Layer,
    padding_idx: int | None = None,
    needs: Needs = Needs(x=False),
) -> Grads:
    """`dS = scaling * dy B`, `dA[:, v] = sum of dS[m] over ids[m] = v`, `dB = scaling * dy^T S`.

    Differentiable in dy, lora_A and lora_B, for double backward.

    Args:
        dy: [M, N], in the dtype of `lora_embedding_fwd`'s y.
        ids, layer: those of `lora_embedding_fwd`; the weight is not read.
        padding_idx: the id whose column of A gets no gradient, as in `nn.Embedding`.
        needs: whether dA and dB are wanted; there is no other gradient.

    Returns:
        dA [R, V] and dB [N, R] in lora_A's dtype.
    """
    acc = sum_dtype(dy)
    wide = dy.to(acc)
    dA: Tensor | None = None
    dB: Tensor | None = None
    if needs.A:
        kept = ids >= 0 if padding_idx is None else ids != padding_idx
        dS = layer.scaling * (wide @ layer.lora_B.to(acc))
        dS = torch.where(kept[:, None], dS, 0.0)
        columns = dS.new_zeros(layer.lora_A.shape[::-1])
        dA = columns.index_add(0, ids, dS).T.to(layer.lora_A.dtype)
    if needs.B:
        # torch's own gather stops the gradient of a gradient, too, at padding_idx.
        S = embedding(ids, layer.lora_A.to(acc).T, padding_idx)
        dB = (layer.scaling * (wide.T @ S)).to(layer.lora_B.dtype)
    return Grads(None, dA, dB)
