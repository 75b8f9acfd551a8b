"""LoRA on an embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from ..backends.contract import Request
from ..layer import Grads, Layer, Needs
from .checks import check_adapter_dtypes, check_devices


def lora_embedding_fwd(
    ids: Tensor, layer: Layer, weight_scale: float = 1.0, *, backend: str | None = None
) -> Tensor:
    """`y[m] = weight_scale * weight[ids[m]] + scaling * A[:, ids[m]] B^T`.

    See `reference.lora_embedding_fwd`.

    Raises:
        IndexError: an id is outside of the table.
    """
    weight, A, B = layer.weight, layer.lora_A, layer.lora_B
    if weight.dim() != 2:
        raise ValueError(f"weight must be [V, N], got {tuple(weight.shape)}")
    _check(ids, weight.dtype, A, B, *weight.shape)
    check_devices("ids'", ids.device, ("weight", weight), ("lora_A", A), ("lora_B", B))
    b = choose(_request("lora_embedding_fwd", ids, weight.dtype, A.dtype), backend)
    return b.lora_embedding_fwd(ids, layer, weight_scale)


def lora_embedding_bwd(
    dy: Tensor,
    ids: Tensor,
    layer: Layer,
    padding_idx: int | None = None,
    needs: Needs = Needs(x=False),
    *,
    backend: str | None = None,
) -> Grads:
    """`(dA, dB)` of `lora_embedding_fwd`; see `reference.lora_embedding_bwd`."""
    A, B = layer.lora_A, layer.lora_B
    if A.dim() != 2 or B.dim() != 2:
        shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
        raise ValueError(f"lora_A must be [R, V] and lora_B [N, R], got {shapes}")
    N, V = B.shape[0], A.shape[1]
    _check(ids, dy.dtype, A, B, V, N)
    if dy.shape != (ids.shape[0], N):
        raise ValueError(f"dy must be [{ids.shape[0]}, {N}], got {tuple(dy.shape)}")
    if padding_idx is not None and not 0 <= padding_idx < V:
        raise ValueError(f"padding_idx must be None or from 0 to {V - 1}, got {padding_idx}")
    check_devices("ids'", ids.device, ("dy", dy), ("lora_A", A), ("lora_B", B))
    b = choose(_request("lora_embedding_bwd", ids, dy.dtype, A.dtype), backend)
    return b.lora_embedding_bwd(dy, ids, layer, padding_idx, needs)


def _request(op: str, ids: Tensor, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Request:
    return Request(op, ids.device.type, ids.device.index, dtype, adapter_dtype)


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
