"""The grouped ops of backends without a grouped kernel: one call of their own op for each expert.

No slice is copied. Where the ends of the segments lie on a GPU, reading them waits for it once.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from ..quant import QuantState
from ..reference import dequantize_absmax, segments

OPS = (
    "grouped_lora_linear_fwd",
    "grouped_lora_linear_bwd",
    "grouped_qlora_linear_fwd",
    "grouped_qlora_linear_bwd",
)


def unsupported(op: str, dropout_p: float) -> str | None:
    """One sentence that says why `op` can't run expert by expert, or None."""
    if op in OPS and dropout_p > 0.0:
        return f"{op} has no kernel whose dropout counts rows from the first of all experts."
    return None


def separable(state: QuantState) -> QuantState:
    """`state`, of which `expert` can give a part: nested absmax that experts share is decoded."""
    blocks = state.absmax.numel() // state.shape[0]
    if state.state2 is None or blocks % state.state2.blocksize == 0:
        return state
    return replace(state, absmax=dequantize_absmax(state), offset=None, state2=None)


def forward(
    backend: ModuleType,
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState | None,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.grouped_lora_linear_fwd` or `reference.grouped_qlora_linear_fwd`, no dropout."""
    y = x.new_zeros(x.shape[0], lora_B.shape[1])
    S = x.new_zeros(x.shape[0], lora_A.shape[1], dtype=torch.float32)
    experts = _Experts(weight, quant_state)
    for e, begin, end in segments(offsets):
        rows = slice(begin, end)
        lora = (None, lora_A[e], lora_B[e], scaling, 0.0, None)
        if experts.state is None:
            y[rows], S[rows] = backend.lora_linear_fwd(x[rows], weight[e], *lora)
        else:
            y[rows], S[rows] = backend.qlora_linear_fwd(
                x[rows], *experts.packed(e), *lora, compute_dtype
            )
    return y, S


def backward(
    backend: ModuleType,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant_state: QuantState | None,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`reference.grouped_lora_linear_bwd` or `reference.grouped_qlora_linear_bwd`, no dropout."""
    K, R = lora_A.shape[2], lora_A.shape[1]
    dx = dy.new_zeros(dy.shape[0], K) if needs[0] else None
    dA = torch.zeros_like(lora_A) if needs[1] else None
    dB = torch.zeros_like(lora_B) if needs[2] else None
    experts = _Experts(weight, quant_state)
    for e, begin, end in segments(offsets):
        rows = slice(begin, end)
        x_rows = dy.new_empty(end - begin, K) if x is None else x[rows]
        S_rows = dy.new_empty(end - begin, R, dtype=torch.float32) if S is None else S[rows]
        lora = (lora_A[e], lora_B[e], S_rows, scaling, 0.0, None)
        if experts.state is None:
            grads = backend.lora_linear_bwd(dy[rows], x_rows, weight[e], *lora, (*needs, False))
        else:
            grads = backend.qlora_linear_bwd(
                dy[rows], x_rows, *experts.packed(e), *lora, compute_dtype, (*needs, False)
            )
        for out, place, grad in ((dx, rows, grads[0]), (dA, e, grads[1]), (dB, e, grads[2])):
            if out is not None:
                out[place] = grad
    return dx, dA, dB


class _Experts:
    """The packed bytes and the quant state of each expert of a stack."""

    def __init__(self, weight: Tensor, state: QuantState | None) -> None:
        self.weight = weight
        self.state = None if state is None else separable(state)

    def packed(self, e: int) -> tuple[Tensor, QuantState]:
        assert self.state is not None
        return self.weight.view(self.state.shape[0], -1)[e], self.state.expert(e)
