"""Several LoRA linears of one input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..layer import Grads, Layer, Needs
from .linear import lora_linear_fwd, skinny_bwd, wide_dx


def shared_linear_fwd(
    x: Tensor,
    layers: Sequence[Layer],
    linear_fwd: Callable[[Tensor, Layer], tuple[Tensor, Tensor]] = lora_linear_fwd,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`y_i = x W_i^T + bias_i + scaling_i * S_i B_i^T`, `S_i = drop_i(x) A_i^T`, for each i.

    Args:
        x: [M, K], fp32, bf16 or fp16 (fp64 for checks).
        layers: all dense or all 4-bit, with the same dtypes; their own N, R and dropout.
        linear_fwd: runs one of them.

    Returns:
        All y_i [M, N_i] in x's dtype, and all S_i [M, R_i] in fp32 (fp64 for fp64).
    """
    results = [linear_fwd(x, layer) for layer in layers]
    return tuple(y for y, _ in results), tuple(S for _, S in results)


def shared_linear_bwd(
    dys: Sequence[Tensor | None],
    x: Tensor,
    layers: Sequence[Layer],
    Ss: Sequence[Tensor],
    needs: Sequence[Needs],
) -> tuple[Tensor | None, tuple[Grads, ...]]:
    """Gradients of `shared_linear_fwd`: those of the single layers, and their sum for x,

        dx = sum over i of dy_i W_i + drop_i'(dS_i A_i)

    which is taken in fp32 and rounded once.

    Args:
        dys: dL/dy_i [M, N_i] in x's dtype; None where y_i has no gradient.
        x, layers: as given to the forward.
        Ss: as returned by the forward.
        needs: of each layer; its `x` says whether the layer takes part in dx.

    Returns:
        dx [M, K] in x's dtype, None if no layer needs it; and for each i the other gradients as in
        `lora_linear_bwd`, None for all of an i without dy_i.
    """
    total: Tensor | None = None
    grads: list[Grads] = []
    for dy, layer, S, need in zip(dys, layers, Ss, needs, strict=True):
        if dy is None:
            grads.append(Grads())
            continue
        dS, own = skinny_bwd(dy, x, layer, S, need)
        grads.append(own)
        if need.x:
            dx = wide_dx(dy, dS, layer)
            total = dx if total is None else total + dx
    return None if total is None else total.to(x.dtype), tuple(grads)
