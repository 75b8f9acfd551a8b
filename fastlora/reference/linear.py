"""LoRA on a linear layer, dense or in 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant import QuantState
from .dropout import drop
from .precision import sum_dtype
from .quantize import dequantize_4bit


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """`S = drop(x) A^T`, `y = x W^T + bias + scaling * S B^T`.

    Args:
        x: [M, K], fp32, bf16 or fp16 (fp64 for checks).
        weight: [N, K], x's dtype, frozen. Where it has another, x is rounded to that one for the
            base product alone.
        bias: [N] or None.
        lora_A: [R, K], fp32 or x's dtype.
        lora_B: [N, R], lora_A's dtype.
        scaling: factor of the LoRA term (alpha / r in PEFT).
        dropout_p: probability of dropping an element of x on the LoRA path, 0 to 1.
        seed: int64, one element; needed when dropout_p > 0.
        first_row: m of x's first row in the dropout's mask: these are rows of a larger batch.

    Returns:
        y [M, N] in x's dtype; S [M, R] in fp32 (fp64 for fp64), unscaled, saved for the backward.
    """
    acc = sum_dtype(x)
    S = shrink(x, lora_A, dropout_p, seed, first_row)
    y = x.to(weight.dtype).to(acc) @ weight.to(acc).T + scaling * (S @ lora_B.to(acc).T)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype), S


def shrink(
    x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | int | None, first_row: int = 0
) -> Tensor:
    """`S = drop(x) A^T`, `[M, R]` in fp32 (fp64 for fp64); arguments as in `lora_linear_fwd`."""
    acc = sum_dtype(x)
    return drop(x.to(acc), dropout_p, seed, first_row) @ lora_A.to(acc).T


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
    first_row: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `lora_linear_fwd`, for `dy = dL/dy`:

        dS = scaling * dy B            dx    = dy W + drop'(dS A)
        dA = dS^T drop(x)              dB    = scaling * dy^T S
                                       dbias = sum over m of dy

    Args:
        dy: [M, N], x's dtype.
        x, weight, lora_A, lora_B, scaling, dropout_p, seed, first_row: as given to the forward.
        S: [M, R], as returned by the forward.
        needs: which of (dx, dA, dB, dbias) to compute.

    Returns:
        dx [M, K] in x's dtype, dA [R, K] and dB [N, R] in the adapter's dtype, dbias [N] in fp32
        (fp64 for fp64); None for what was not asked for.
    """
    lora = (lora_A, lora_B, S, scaling, dropout_p, seed)
    dS, dA, dB, dbias = skinny_bwd(dy, x, *lora, needs[1:], first_row)
    if not needs[0]:
        return None, dA, dB, dbias
    dx = wide_dx(dy, dS, weight, lora_A, dropout_p, seed, first_row)
    return dx.to(dy.dtype), dA, dB, dbias


def wide_dx(
    dy: Tensor,
    dS: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    dropout_p: float,
    seed: Tensor | int | None,
    first_row: int = 0,
) -> Tensor:
    """`dy W + drop'(dS A)`, `[M, K]` in dS's dtype: dx of `lora_linear_bwd` before it is rounded.

    Arguments as in `lora_linear_bwd`; dS as returned by `skinny_bwd`.
    """
    base = dy.to(weight.dtype).to(dS.dtype) @ weight.to(dS.dtype)
    return base + expand_dx(dS, lora_A, dropout_p, seed, first_row)


def skinny_bwd(
    dy: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | int | None,
    needs: tuple[bool, ...],
    first_row: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """All of `lora_linear_bwd` that does not touch W: `dS`, `[M, R]` in fp32, then dA, dB, dbias.

    Arguments as in `lora_linear_bwd`; `needs` says which of dA, dB and dbias to compute.
    """
    acc = sum_dtype(dy)
    need_dA, need_dB, need_dbias = needs
    g = dy.to(acc)
    dS = scaling * (g @ lora_B.to(acc))
    dA = dB = dbias = None
    if need_dA:
        dA = (dS.T @ drop(x.to(acc), dropout_p, seed, first_row)).to(lora_A.dtype)
    if need_dB:
        dB = (scaling * (g.T @ S)).to(lora_B.dtype)
    if need_dbias:
        dbias = g.sum(0)
    return dS, dA, dB, dbias


def expand_dx(
    dS: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | int | None, first_row: int = 0
) -> Tensor:
    """`drop'(dS A)`, `[M, K]` in dS's dtype: the LoRA term of dx."""
    return drop(dS @ lora_A.to(dS.dtype), dropout_p, seed, first_row)


def qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`S = drop(x) A^T`, `y = x W^T + bias + scaling * S B^T`, `W = dequantize_4bit(weight)`.

    Args:
        x: [M, K], fp32, bf16 or fp16 (fp64 for checks).
        weight: uint8, ceil(N K / 2) bytes, two codes a byte, high nibble first.
        quant_state: absmax, code, blocksize and, for nested absmax, offset and state2.
        bias, lora_A, lora_B, scaling, dropout_p, seed: as in `lora_linear_fwd`.
        compute_dtype: dtype to which W is decoded and x rounded for the base product, as
            bitsandbytes' Linear4bit.compute_dtype; x's dtype when None. The LoRA path always reads
            x as it came, and y keeps x's dtype.

    Returns:
        y [M, N] in x's dtype; S [M, R] in fp32 (fp64 for fp64).
    """
    W = dequantize_4bit(weight, quant_state, compute_dtype or x.dtype)
    return lora_linear_fwd(x, W, bias, lora_A, lora_B, scaling, dropout_p, seed)


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
    seed: Tensor | int | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `qlora_linear_fwd`: those of `lora_linear_bwd` with the decoded W.

    Arguments as in `qlora_linear_fwd` and `lora_linear_bwd`; returns as `lora_linear_bwd`.
    """
    W = dequantize_4bit(weight, quant_state, compute_dtype or x.dtype)
    return lora_linear_bwd(dy, x, W, lora_A, lora_B, S, scaling, dropout_p, seed, needs)


def merge_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`W + scaling * B A`, not yet rounded to W's dtype.

    Args:
        weight: [N, K], dense.
        lora_A: [R, K].
        lora_B: [N, R].
        scaling: factor of the LoRA term.

    Returns:
        [N, K] in fp32 (fp64 for fp64).
    """
    acc = sum_dtype(weight)
    return weight.to(acc) + scaling * (lora_B.to(acc) @ lora_A.to(acc))
