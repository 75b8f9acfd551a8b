"""The Triton backend: one source for every GPU that Triton reaches, and its interpreter on CPUs.

Triton itself is imported when an op first runs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ... import reference
from ...quant import QuantState
from ...reference import Projection
from .. import grouped, sequence
from ..machine.gpu import unsupported_gpu
from ..native import _asked, _empty
from ..native_cuda import state_args
from . import library as library  # registers torch.ops.fastlora_triton

NAME = "triton"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_reason = (
    "triton is not installed; `pip install triton` brings it."
    if importlib.util.find_spec("triton") is None
    else None
)


def interpreted() -> bool:
    """True when Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def unavailable_reason() -> str | None:
    """One sentence: why Triton can't be used and what helps; None when it can."""
    return _reason


def unsupported(
    op: str,
    device: str,
    dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    index: int | None = None,
    dropout_p: float = 0.0,
) -> str | None:
    """One sentence that says why `op` can't run here, or None."""
    if op == "quantize_4bit" or "lora_embedding" in op or "dora" in op:
        return f"{op} has no Triton kernel."
    if device not in ("cpu", "cuda"):
        return f"{op} has no Triton kernel for device {device!r}."
    if reason := unavailable_reason():
        return reason
    if device == "cpu" and not interpreted():
        return (
            "Triton runs on the CPU only in its interpreter: "
            "set TRITON_INTERPRET=1 before Python starts."
        )
    if device == "cuda" and (reason := unsupported_gpu(index)):
        return reason
    for name, given in (("x", dtype), ("lora_A", adapter_dtype), ("compute_dtype", compute_dtype)):
        if given is not None and given not in _DTYPES:
            return f"{op} takes fp32, bf16 and fp16, got {name} in {given}."
    return grouped.unsupported(op, dropout_p)


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.lora_linear_fwd`."""
    if _empty(x, lora_B):
        return reference.lora_linear_fwd(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    return torch.ops.fastlora_triton.lora_linear_fwd(
        x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed
    )


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
) -> tuple[Tensor | None, ...]:
    """`reference.lora_linear_bwd`."""
    args = (dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed)
    if _empty(x, lora_B):
        return reference.lora_linear_bwd(*args, needs)
    return _asked(torch.ops.fastlora_triton.lora_linear_bwd(*args, *needs), needs)


def qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.qlora_linear_fwd`."""
    lora = (bias, lora_A, lora_B, scaling, dropout_p, seed)
    if _empty(x, lora_B):
        return reference.qlora_linear_fwd(x, weight, quant_state, *lora, compute_dtype)
    return torch.ops.fastlora_triton.qlora_linear_fwd(
        x, weight, *state_args(quant_state), compute_dtype or x.dtype, *lora
    )


def qlora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
) -> tuple[Tensor | None, ...]:
    """`reference.qlora_linear_bwd`."""
    lora = (lora_A, lora_B, S, scaling, dropout_p, seed)
    if _empty(x, lora_B):
        return reference.qlora_linear_bwd(
            dy, x, weight, quant_state, *lora, compute_dtype, needs=needs
        )
    grads = torch.ops.fastlora_triton.qlora_linear_bwd(
        dy, x, weight, *state_args(quant_state), compute_dtype or x.dtype, *lora, *needs
    )
    return _asked(grads, needs)


def shared_linear_fwd(
    x: Tensor, projections: Sequence[Projection]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`reference.shared_linear_fwd`."""
    return sequence.shared_linear_fwd(_self(), x, projections)


def shared_linear_bwd(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    Ss: Sequence[Tensor],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
) -> tuple[Tensor | None, tuple[tuple[Tensor | None, ...], ...]]:
    """`reference.shared_linear_bwd`."""
    return sequence.shared_linear_bwd(_self(), dys, x, projections, Ss, need_dx, needs)


def grouped_lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.grouped_lora_linear_fwd`, one launch for each expert; no dropout."""
    return grouped.forward(_self(), x, weight, None, offsets, lora_A, lora_B, scaling)


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
) -> tuple[Tensor | None, ...]:
    """`reference.grouped_lora_linear_bwd`, one launch for each expert; no dropout."""
    lora = (lora_A, lora_B, S, scaling, None, needs)
    return grouped.backward(_self(), dy, x, weight, None, offsets, *lora)


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
) -> tuple[Tensor, Tensor]:
    """`reference.grouped_qlora_linear_fwd`, one launch for each expert; no dropout."""
    lora = (lora_A, lora_B, scaling, compute_dtype)
    return grouped.forward(_self(), x, weight, quant_state, offsets, *lora)


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
) -> tuple[Tensor | None, ...]:
    """`reference.grouped_qlora_linear_bwd`, one launch for each expert; no dropout."""
    lora = (lora_A, lora_B, S, scaling, compute_dtype, needs)
    return grouped.backward(_self(), dy, x, weight, quant_state, offsets, *lora)


def _self() -> ModuleType:
    return sys.modules[__name__]


def dequantize_4bit(
    packed: Tensor,
    quant_state: QuantState,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.dequantize_4bit`."""
    if out is None:
        out = torch.empty(quant_state.shape, dtype=dtype or quant_state.dtype, device=packed.device)
    if out.numel():
        torch.ops.fastlora_triton.dequantize_4bit_out(packed, *state_args(quant_state), out)
    return out


def shrink(x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """`reference.shrink`."""
    return torch.ops.fastlora_triton.shrink(x, lora_A, dropout_p, seed)


def skinny_bwd(
    dy: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`reference.skinny_bwd`."""
    args = (dy, x, lora_A, lora_B, S, scaling, dropout_p, seed)
    dS, *grads = torch.ops.fastlora_triton.skinny_bwd(*args, *needs)
    return dS, *_asked(tuple(grads), needs)
