"""Computes a call of PEFT's LoRA on an embedding.

PEFT rounds the table's rows, the LoRA term and their sum, each to its own dtype; the op rounds the
sum, once, to the table's. PEFT's dropout does nothing on an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....autograd.embedding import lora_embedding
from ..plan.embedding import EmbeddingParts
from .tensors import cast


def embed(parts: EmbeddingParts, ids: Tensor) -> Tensor:
    """`y = e * (E[ids] + scaling * A[:, ids] B^T)`, e the embedding's own scale."""
    weight_scale, scaling = 1.0, parts.scaling
    if parts.rounds_scale is not None:
        weight_scale, term_scale = _scales(parts)
        scaling *= term_scale
    return lora_embedding(
        ids,
        parts.weight,
        cast(parts.lora_A, parts.dtype),
        cast(parts.lora_B, parts.dtype),
        scaling,
        weight_scale=weight_scale,
        padding_idx=parts.base.padding_idx,
    )


def _scales(parts: EmbeddingParts) -> tuple[float, float]:
    """`embed_scale` as the base layer and as PEFT's LoRA term round it."""
    scale: Any = parts.base.embed_scale
    rounded = torch.as_tensor(scale, device="cpu").to(parts.weight.dtype)
    # PEFT turns a number into a tensor of the table's dtype.
    term = scale if isinstance(scale, Tensor) else rounded
    base = rounded if parts.rounds_scale else scale
    return float(base), float(term.to(parts.lora_A.dtype))
