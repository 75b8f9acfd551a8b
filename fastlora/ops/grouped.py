"""The LoRA linears of a stack of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from ..quant import QuantState, as_quant_state, packed_bytes
from .checks import check_adapter, check_bytes, check_devices

_Trio = tuple[Tensor | None, Tensor | None, Tensor | None]


def grouped_lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`lora_linear_fwd` on each expert's rows; see `reference.grouped_lora_linear_fwd`.

    Raises:
        ValueError: a shape, the offsets or the seed do not fit. TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    _check_stack(x, x.shape[-1], weight, lora_A, lora_B)
    offsets = _check_offsets(offsets, x.shape[0], lora_A)
    check_adapter(x, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "grouped_lora_linear_fwd",
        x.device.type,
        backend,
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        dropout_p=dropout_p,
        index=x.device.index,
    )
    return b.grouped_lora_linear_fwd(x, weight, offsets, lora_A, lora_B, scaling, dropout_p, seed)


def grouped_lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
    *,
    backend: str | None = None,
) -> _Trio:
    """`(dx, dA, dB)` of `grouped_lora_linear_fwd`; see `reference.grouped_lora_linear_bwd`.

    Raises:
        ValueError: a shape, the offsets or the seed do not fit. TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    K = weight.shape[-1]
    _check_grouped_backward(dy, x, lora_A, lora_B, S, needs, K)
    _check_stack(dy, K, weight, lora_A, lora_B)
    offsets = _check_offsets(offsets, dy.shape[0], lora_A)
    check_adapter(dy, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "grouped_lora_linear_bwd",
        dy.device.type,
        backend,
        dtype=dy.dtype,
        adapter_dtype=lora_A.dtype,
        dropout_p=dropout_p,
        index=dy.device.index,
    )
    lora = (lora_A, lora_B, S, scaling, dropout_p, seed)
    return b.grouped_lora_linear_bwd(dy, x, weight, offsets, *lora, needs)


def grouped_qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`qlora_linear_fwd` on each expert's rows; see `reference.grouped_qlora_linear_fwd`.

    Raises:
        ValueError: a shape, the quant_state, the offsets or the seed do not fit.
        TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    state = as_quant_state(quant_state)
    weight = _check_packed_stack(x, x.shape[-1], weight, state, lora_A, lora_B)
    offsets = _check_offsets(offsets, x.shape[0], lora_A)
    check_adapter(x, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "grouped_qlora_linear_fwd",
        x.device.type,
        backend,
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        compute_dtype=compute_dtype,
        dropout_p=dropout_p,
        index=x.device.index,
    )
    lora = (lora_A, lora_B, scaling, dropout_p, seed)
    return b.grouped_qlora_linear_fwd(x, weight, state, offsets, *lora, compute_dtype)


def grouped_qlora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant_state: QuantState,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
    *,
    backend: str | None = None,
) -> _Trio:
    """`(dx, dA, dB)` of `grouped_qlora_linear_fwd`; see `reference.grouped_qlora_linear_bwd`.

    Raises:
        ValueError: a shape, the quant_state, the offsets or the seed do not fit.
        TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    state = as_quant_state(quant_state)
    K = int(state.shape[-1])
    _check_grouped_backward(dy, x, lora_A, lora_B, S, needs, K)
    weight = _check_packed_stack(dy, K, weight, state, lora_A, lora_B)
    offsets = _check_offsets(offsets, dy.shape[0], lora_A)
    check_adapter(dy, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "grouped_qlora_linear_bwd",
        dy.device.type,
        backend,
        dtype=dy.dtype,
        adapter_dtype=lora_A.dtype,
        compute_dtype=compute_dtype,
        dropout_p=dropout_p,
        index=dy.device.index,
    )
    lora = (lora_A, lora_B, S, scaling, dropout_p, seed)
    return b.grouped_qlora_linear_bwd(dy, x, weight, state, offsets, *lora, compute_dtype, needs)


def _check_stack(x: Tensor, K: int, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """A dense stack against x, or dy, and the in_features K."""
    if weight.dim() != 3 or x.dim() != 2 or weight.shape[2] != K:
        raise ValueError(
            f"x must be [M, K] and weight [E, N, K], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    check_devices("x's", x.device, ("weight", weight))
    _check_experts(tuple(weight.shape), lora_A, lora_B)


def _check_packed_stack(
    x: Tensor, K: int, weight: Tensor, state: QuantState, lora_A: Tensor, lora_B: Tensor
) -> Tensor:
    """The bytes of a packed stack, flat, after checking them against K and the adapters."""
    shape = tuple(state.shape)
    if x.dim() != 2 or len(shape) != 3 or shape[2] != K:
        raise ValueError(f"quant_state.shape must be (E, N, {K}) to match x, got {shape}")
    if (shape[1] * shape[2]) % state.blocksize:
        raise ValueError(
            f"each expert must have whole blocks of {state.blocksize} elements, "
            f"got experts of {shape[1]} x {shape[2]}"
        )
    parts = [("weight and quant_state", tensor) for tensor in (weight, *state.tensors())]
    check_devices("x's", x.device, *parts)
    packed = packed_bytes(weight)
    check_bytes(packed, state)
    _check_experts(shape, lora_A, lora_B)
    return packed


def _check_experts(shape: tuple[int, ...], lora_A: Tensor, lora_B: Tensor) -> None:
    E, N, K = shape
    if lora_A.dim() != 3 or (lora_A.shape[0], lora_A.shape[2]) != (E, K):
        raise ValueError(f"lora_A must be [{E}, R, {K}] to match weight, got {tuple(lora_A.shape)}")
    R = lora_A.shape[1]
    if tuple(lora_B.shape) != (E, N, R):
        raise ValueError(f"lora_B must be [{E}, {N}, {R}], got {tuple(lora_B.shape)}")


def _check_offsets(offsets: Tensor, M: int, lora_A: Tensor) -> Tensor:
    """The offsets in int64. Their values are checked on the CPU alone: elsewhere it would wait."""
    E = lora_A.shape[0]
    if tuple(offsets.shape) != (E,) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets must be int32 or int64 [{E}], got {tuple(offsets.shape)} in {offsets.dtype}"
        )
    if offsets.device.type == "cpu" and E > 0:
        ends = offsets.tolist()
        if ends[0] < 0 or ends[-1] > M or ends != sorted(ends):
            raise ValueError(f"offsets must ascend from 0 to at most {M}, got {ends}")
    return offsets.to(torch.int64)


def _check_grouped_backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    needs: tuple[bool, bool, bool],
    K: int,
) -> None:
    M, N = dy.shape[0], lora_B.shape[1]
    if tuple(dy.shape) != (M, N):
        raise ValueError(f"dy must be [M, {N}], got {tuple(dy.shape)}")
    if (x is None and needs[1]) or (x is not None and tuple(x.shape) != (M, K)):
        got = "None" if x is None else f"{tuple(x.shape)}"
        raise ValueError(f"x must be [{M}, {K}] where dA is needed, got {got}")
    if x is not None and x.dtype != dy.dtype:
        raise TypeError(f"dy must have x's dtype {x.dtype}, got {dy.dtype}")
    R = lora_A.shape[1]
    if (S is None and needs[2]) or (S is not None and tuple(S.shape) != (M, R)):
        got = "None" if S is None else f"{tuple(S.shape)}"
        raise ValueError(f"S must be [{M}, {R}] where dB is needed, got {got}")
