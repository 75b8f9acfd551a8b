"""LoRA on an embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from .checks import check_adapter_dtypes, check_devices


def lora_embedding_fwd(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    weight_scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """`y[m] = weight_scale * weight[ids[m]] + scaling * A[:, ids[m]] B^T`.

    See `reference.lora_embedding_fwd`.

    Raises:
        ValueError: a shape does not fit. TypeError: a dtype does not fit.
        IndexError: an id lies outside of the table.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be [V, N], got {tuple(weight.shape)}")
    _check(ids, weight.dtype, lora_A, lora_B, *weight.shape)
    tensors = (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B))
    check_devices("ids'", ids.device, *tensors)
    b = choose(
        "lora_embedding_fwd",
        ids.device.type,
        backend,
        dtype=weight.dtype,
        adapter_dtype=lora_A.dtype,
        index=ids.device.index,
    )
    return b.lora_embedding_fwd(ids, weight, lora_A, lora_B, scaling, weight_scale)


def lora_embedding_bwd(
    dy: Tensor,
    ids: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
    needs: tuple[bool, bool] = (True, True),
    *,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`(dA, dB)` of `lora_embedding_fwd`; see `reference.lora_embedding_bwd`.

    Raises:
        ValueError: a shape, or padding_idx, does not fit. TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    if lora_A.dim() != 2 or lora_B.dim() != 2:
        shapes = f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        raise ValueError(f"lora_A must be [R, V] and lora_B [N, R], got {shapes}")
    N, V = lora_B.shape[0], lora_A.shape[1]
    _check(ids, dy.dtype, lora_A, lora_B, V, N)
    if dy.shape != (ids.shape[0], N):
        raise ValueError(f"dy must be [{ids.shape[0]}, {N}], got {tuple(dy.shape)}")
    if padding_idx is not None and not 0 <= padding_idx < V:
        raise ValueError(f"padding_idx must be None or from 0 to {V - 1}, got {padding_idx}")
    check_devices("ids'", ids.device, ("dy", dy), ("lora_A", lora_A), ("lora_B", lora_B))
    b = choose(
        "lora_embedding_bwd",
        ids.device.type,
        backend,
        dtype=dy.dtype,
        adapter_dtype=lora_A.dtype,
        index=ids.device.index,
    )
    return b.lora_embedding_bwd(dy, ids, lora_A, lora_B, scaling, padding_idx, needs)


def _check(ids: Tensor, dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, V: int, N: int) -> None:
    if ids.dim() != 1:
        raise ValueError(f"ids must be [M], got {tuple(ids.shape)}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if lora_A.dim() != 2 or lora_A.shape[0] == 0 or lora_A.shape[1] != V:
        raise ValueError(f"lora_A must be [R, {V}], R >= 1, got {tuple(lora_A.shape)}")
    if lora_B.shape != (N, lora_A.shape[0]):
        raise ValueError(
            f"lora_B must be [{N}, {lora_A.shape[0]}] to match lora_A, got {tuple(lora_B.shape)}"
        )
    check_adapter_dtypes("the table's", dtype, lora_A, lora_B)
