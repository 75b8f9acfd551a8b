"""The LoRA linears of a stack of experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layer import Grads, Layer, Needs
from .linear import dense_weight, lora_linear_bwd, lora_linear_fwd
from .precision import sum_dtype


def segments(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """`(e, begin, end)`: the rows of each expert that has any, from the ends in `offsets`."""
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            yield e, begin, end
        begin = end


def grouped_lora_linear_fwd(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """Each row of x times the weight of its expert: `lora_linear_fwd` on every segment of rows.

        S[m] = drop(x)[m] A[e]^T,   y[m] = x[m] W[e]^T + scaling * S[m] B[e]^T
        for offsets[e - 1] <= m < offsets[e]

    The dropout's mask is that of all of x: a row's bits do not depend on its expert. Rows from
    offsets[-1] on have no expert, and zeros in y and S.

    Args:
        x: [M, K], rows sorted by expert.
        layer: a stack of experts with offsets and no bias, see `Layer`. In 4 bits N K is a
            multiple of the blocksize, so that no block belongs to two experts.

    Returns:
        y [M, N] in x's dtype; S [M, R] in fp32 (fp64 for fp64).
    """
    y = x.new_zeros(x.shape[0], layer.lora_B.shape[1])
    S = x.new_zeros(x.shape[0], layer.lora_A.shape[1], dtype=sum_dtype(x))
    for _, rows, expert in experts(layer, x.dtype):
        y[rows], S[rows] = lora_linear_fwd(x[rows], expert, rows.start)
    return y, S


def grouped_lora_linear_bwd(
    dy: Tensor, x: Tensor | None, layer: Layer, S: Tensor | None, needs: Needs
) -> Grads:
    """Gradients of `grouped_lora_linear_fwd`: `lora_linear_bwd` on every segment of rows.

    Args:
        dy: [M, N], x's dtype.
        x: [M, K]; may be None where dA is not asked for.
        layer: as given to the forward.
        S: [M, R]; may be None where dB is not asked for.
        needs: which gradients to compute; a bias has none.

    Returns:
        dx [M, K] in dy's dtype, dA [E, R, K] and dB [E, N, R] in the adapter's dtype. Zeros for
        experts without rows, and for rows without an expert.
    """
    out = empty_grads(dy, layer, needs)
    for e, rows, expert in experts(layer, dy.dtype):
        # Unneeded tensors are not read.
        x_rows, S_rows = (dy if t is None else t[rows] for t in (x, S))
        grads = lora_linear_bwd(dy[rows], x_rows, expert, S_rows, needs, rows.start)
        fill(out, e, rows, grads)
    return out


def empty_grads(dy: Tensor, layer: Layer, needs: Needs) -> Grads:
    """Zeros in the shapes of the gradients of a stack, for `fill`."""
    dx = dy.new_zeros(dy.shape[0], layer.lora_A.shape[2]) if needs.x else None
    dA = torch.zeros_like(layer.lora_A) if needs.A else None
    dB = torch.zeros_like(layer.lora_B) if needs.B else None
    return Grads(dx, dA, dB)


def fill(out: Grads, e: int, rows: slice, grads: Grads) -> None:
    """Writes the gradients of expert e, whose rows are `rows`, into those of the stack."""
    for whole, place, grad in ((out.x, rows, grads.x), (out.A, e, grads.A), (out.B, e, grads.B)):
        if whole is not None and grad is not None:
            whole[place] = grad


def experts(layer: Layer, dtype: torch.dtype) -> Iterator[tuple[int, slice, Layer]]:
    """Each expert that has rows: its number, its rows, and itself as a dense layer."""
    assert layer.offsets is not None
    W = dense_weight(layer, dtype)
    for e, begin, end in segments(layer.offsets):
        yield (
            e,
            slice(begin, end),
            layer._replace(
                weight=W[e],
                lora_A=layer.lora_A[e],
                lora_B=layer.lora_B[e],
                quant_state=None,
                offsets=None,
            ),
        )
