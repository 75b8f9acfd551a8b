"""Several LoRA linears of one input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..quant import QuantState
from .linear import lora_linear_fwd, qlora_linear_fwd, skinny_bwd, wide_dx
from .quantize import dequantize_4bit


class Projection(NamedTuple):
    """One of several LoRA linears that read the same x; fields as the arguments of the single ops.

    `weight` is dense where `quant_state` is None, else packed 4-bit bytes.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    quant_state: QuantState | None = None
    compute_dtype: torch.dtype | None = None


def shared_linear_fwd(
    x: Tensor, projections: Sequence[Projection]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`y_i = x W_i^T + bias_i + scaling_i * S_i B_i^T`, `S_i = drop_i(x) A_i^T`, for each i.

    Args:
        x: [M, K], fp32, bf16 or fp16 (fp64 for checks).
        projections: all dense or all 4-bit, with the same dtypes; their own N, R and dropout.

    Returns:
        All y_i [M, N_i] in x's dtype, and all S_i [M, R_i] in fp32 (fp64 for fp64).
    """
    results = [_projection_fwd(x, p) for p in projections]
    return tuple(y for y, _ in results), tuple(S for _, S in results)


def _projection_fwd(x: Tensor, p: Projection) -> tuple[Tensor, Tensor]:
    lora = (p.bias, p.lora_A, p.lora_B, p.scaling, p.dropout_p, p.seed)
    if p.quant_state is None:
        return lora_linear_fwd(x, p.weight, *lora)
    return qlora_linear_fwd(x, p.weight, p.quant_state, *lora, p.compute_dtype)


def shared_linear_bwd(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    Ss: Sequence[Tensor],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
) -> tuple[Tensor | None, tuple[tuple[Tensor | None, Tensor | None, Tensor | None], ...]]:
    """Gradients of `shared_linear_fwd`: those of the single ops, and their sum for x,

        dx = sum over i of dy_i W_i + drop_i'(dS_i A_i)

    which is taken in fp32 and rounded once.

    Args:
        dys: dL/dy_i [M, N_i] in x's dtype; None where y_i has no gradient.
        x, projections: as given to the forward.
        Ss: as returned by the forward.
        need_dx: whether to compute dx.
        needs: which of (dA_i, dB_i, dbias_i) to compute.

    Returns:
        dx [M, K] in x's dtype, and for each i (dA_i, dB_i, dbias_i) as in `lora_linear_bwd`; None
        for what was not asked for, and for all of an i without dy_i.
    """
    total: Tensor | None = None
    grads: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = []
    for dy, p, S, need in zip(dys, projections, Ss, needs, strict=True):
        if dy is None:
            grads.append((None, None, None))
            continue
        lora = (p.lora_A, p.lora_B, S, p.scaling, p.dropout_p, p.seed)
        dS, dA, dB, dbias = skinny_bwd(dy, x, *lora, need)
        grads.append((dA, dB, dbias))
        if need_dx:
            W = p.weight
            if p.quant_state is not None:
                W = dequantize_4bit(W, p.quant_state, p.compute_dtype or x.dtype)
            dx = wide_dx(dy, dS, W, p.lora_A, p.dropout_p, p.seed)
            total = dx if total is None else total + dx
    return None if total is None else total.to(x.dtype), tuple(grads)
