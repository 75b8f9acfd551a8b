"""Several linears of one input, one after the other: for backends with the single ops alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import Projection


def shared_linear_fwd(
    backend: Any, x: Tensor, projections: Sequence[Projection]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`reference.shared_linear_fwd` by the single ops of `backend`."""
    results = []
    for p in projections:
        lora = (p.bias, p.lora_A, p.lora_B, p.scaling, p.dropout_p, p.seed)
        if p.quant_state is None:
            results.append(backend.lora_linear_fwd(x, p.weight, *lora))
        else:
            results.append(
                backend.qlora_linear_fwd(x, p.weight, p.quant_state, *lora, p.compute_dtype)
            )
    return tuple(y for y, _ in results), tuple(S for _, S in results)


def shared_linear_bwd(
    backend: Any,
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    Ss: Sequence[Tensor],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
) -> tuple[Tensor | None, tuple[tuple[Tensor | None, ...], ...]]:
    """`reference.shared_linear_bwd` by the single ops of `backend`.

    Each op rounds its part of dx; their sum is taken in fp32 and rounded once more.
    """
    total: Tensor | None = None
    grads: list[tuple[Tensor | None, ...]] = []
    for dy, p, S, need in zip(dys, projections, Ss, needs, strict=True):
        if dy is None:
            grads.append((None, None, None))
            continue
        lora = (p.lora_A, p.lora_B, S, p.scaling, p.dropout_p, p.seed)
        asked = (need_dx, *need)
        if p.quant_state is None:
            dx, *rest = backend.lora_linear_bwd(dy, x, p.weight, *lora, asked)
        else:
            dx, *rest = backend.qlora_linear_bwd(
                dy, x, p.weight, p.quant_state, *lora, p.compute_dtype, asked
            )
        grads.append(tuple(rest))
        if dx is not None:
            total = (
                dx.to(torch.promote_types(dx.dtype, torch.float32))
                if total is None
                else total.add_(dx)
            )
    return None if total is None else total.to(x.dtype), tuple(grads)
