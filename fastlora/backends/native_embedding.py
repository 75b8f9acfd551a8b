"""The native backend's ops of an embedding: C++ on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference

ops: Any = torch.ops.fastlora


def lora_embedding_fwd(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    weight_scale: float = 1.0,
) -> Tensor:
    """`reference.lora_embedding_fwd`."""
    args = (ids, weight, lora_A, lora_B, scaling, weight_scale)
    if weight.numel() == 0:
        return reference.lora_embedding_fwd(*args)
    try:
        return ops.lora_embedding_fwd(*args)
    except RuntimeError as error:
        # The binding raises one type for all; torch's own embedding an IndexError for its ids.
        if ((ids < 0) | (ids >= len(weight))).any():
            raise IndexError(f"ids must be from 0 to {len(weight) - 1}") from error
        raise


def lora_embedding_bwd(
    dy: Tensor,
    ids: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """`reference.lora_embedding_bwd`."""
    if lora_A.numel() == 0 or lora_B.numel() == 0:
        return reference.lora_embedding_bwd(dy, ids, lora_A, lora_B, scaling, padding_idx, needs)
    padding = -1 if padding_idx is None else padding_idx
    dA, dB = ops.lora_embedding_bwd(dy, ids, lora_A, lora_B, scaling, padding, *needs)
    return dA if needs[0] else None, dB if needs[1] else None


def register_fakes() -> None:
    """Shapes without data, for torch.compile."""

    @torch.library.register_fake("fastlora::lora_embedding_fwd")
    def _(ids, weight, lora_A, lora_B, scaling, weight_scale):  # type: ignore[no-untyped-def]
        return weight.new_empty((ids.shape[0], weight.shape[1]))

    @torch.library.register_fake("fastlora::lora_embedding_bwd")
    def _(dy, ids, lora_A, lora_B, scaling, padding_idx, need_dA, need_dB):  # type: ignore[no-untyped-def]
        def grad(like: Tensor, need: bool) -> Tensor:
            if need:
                return like.new_empty(like.shape)
            return like.new_empty((0,), dtype=torch.float32)

        return grad(lora_A, need_dA), grad(lora_B, need_dB)
