"""The LoRA linears of a stack of experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..quant import QuantState
from .linear import lora_linear_bwd, lora_linear_fwd
from .precision import sum_dtype
from .quantize import dequantize_4bit


def segments(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """`(e, begin, end)`: the rows of each expert that has any, from the ends in `offsets`."""
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            yield e, begin, end
        begin = end


def grouped_lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Each row of x times the weight of its expert: `lora_linear_fwd` on every segment of rows.

        S[m] = drop(x)[m] A[e]^T,   y[m] = x[m] W[e]^T + scaling * S[m] B[e]^T
        for offsets[e - 1] <= m < offsets[e]

    The dropout's mask is that of all of x: a row's bits do not depend on its expert. Rows from
    offsets[-1] on have no expert, and zeros in y and S.

    Args:
        x: [M, K], rows sorted by expert.
        weight: [E, N, K], x's dtype, frozen.
        offsets: [E], int32 or int64, ascending: where the rows of each expert end, at most M.
        lora_A: [E, R, K], fp32 or x's dtype.
        lora_B: [E, N, R], lora_A's dtype.
        scaling, dropout_p, seed: as in `lora_linear_fwd`.

    Returns:
        y [M, N] in x's dtype; S [M, R] in fp32 (fp64 for fp64).
    """
    y = x.new_zeros(x.shape[0], lora_B.shape[1])
    S = x.new_zeros(x.shape[0], lora_A.shape[1], dtype=sum_dtype(x))
    for e, begin, end in segments(offsets):
        rows = slice(begin, end)
        lora = (lora_A[e], lora_B[e], scaling, dropout_p, seed, begin)
        y[rows], S[rows] = lora_linear_fwd(x[rows], weight[e], None, *lora)
    return y, S


def grouped_qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`grouped_lora_linear_fwd` with `W = dequantize_4bit(weight)`, `[E, N, K]`.

    Args:
        weight: uint8, the stack's E N K / 2 bytes; N K is a multiple of the blocksize, so that the
            blocks of one expert are its own.
        compute_dtype: as in `qlora_linear_fwd`.
    """
    W = dequantize_4bit(weight, quant_state, compute_dtype or x.dtype)
    return grouped_lora_linear_fwd(x, W, offsets, lora_A, lora_B, scaling, dropout_p, seed)


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
    seed: Tensor | int | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `grouped_lora_linear_fwd`: `lora_linear_bwd` on every segment of rows.

    Args:
        dy: [M, N], x's dtype.
        x: [M, K]; may be None where dA is not asked for.
        S: [M, R]; may be None where dB is not asked for.
        weight, offsets, lora_A, lora_B, scaling, dropout_p, seed: as given to the forward.
        needs: which of (dx, dA, dB) to compute.

    Returns:
        dx [M, K] in dy's dtype, dA [E, R, K] and dB [E, N, R] in the adapter's dtype; None for what
        was not asked for. Zeros for experts without rows, and for rows without an expert.
    """
    need_dx, need_dA, need_dB = needs
    dx = dy.new_zeros(dy.shape[0], lora_A.shape[2]) if need_dx else None
    dA = torch.zeros_like(lora_A) if need_dA else None
    dB = torch.zeros_like(lora_B) if need_dB else None
    for e, begin, end in segments(offsets):
        rows = slice(begin, end)
        # What is not needed is not read.
        x_rows, S_rows = (dy if t is None else t[rows] for t in (x, S))
        lora = (lora_A[e], lora_B[e], S_rows, scaling, dropout_p, seed, (*needs, False), begin)
        grads = lora_linear_bwd(dy[rows], x_rows, weight[e], *lora)
        for out, place, grad in ((dx, rows, grads[0]), (dA, e, grads[1]), (dB, e, grads[2])):
            if out is not None and grad is not None:
                out[place] = grad
    return dx, dA, dB


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
    seed: Tensor | int | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `grouped_qlora_linear_fwd`: those of `grouped_lora_linear_bwd`."""
    W = dequantize_4bit(weight, quant_state, compute_dtype or dy.dtype)
    lora = (lora_A, lora_B, S, scaling, dropout_p, seed)
    return grouped_lora_linear_bwd(dy, x, W, offsets, *lora, needs)
