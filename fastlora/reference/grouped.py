"""The LoRA linears of a stack of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..layer import Grads, Layer, Needs
from ..quant import QuantState
from .linear import lora_linear_bwd, lora_linear_fwd
from .precision import sum_dtype
from .quantize import dequantize_absmax


def grouped_lora_linear_fwd(
    x: Tensor, layer: Layer, linear_fwd: Callable[..., tuple[Tensor, Tensor]] = lora_linear_fwd
) -> tuple[Tensor, Tensor]:
    """Each row of x times the weight of its expert: `lora_linear_fwd` on every segment of rows.

        S[m] = drop(x)[m] A[e]^T,   y[m] = x[m] W[e]^T + scaling * S[m] B[e]^T
        for offsets[e - 1] <= m < offsets[e]

    The dropout's mask is that of all of x: a row's bits do not depend on its expert. Rows from
    offsets[-1] on have no expert, and zeros in y and S.

    Args:
        x: [M, K], rows sorted by expert.
        layer: a stack of experts with offsets and no bias, see `Layer`. In 4 bits N K is a
            multiple of the blocksize, so that no block belongs to two experts.
        linear_fwd: runs an expert, in place of `lora_linear_fwd`.

    Returns:
        y [M, N] in x's dtype; S [M, R] in fp32 (fp64 for fp64).
    """
    y = x.new_zeros(x.shape[0], layer.lora_B.shape[1])
    S = x.new_zeros(x.shape[0], layer.lora_A.shape[1], dtype=sum_dtype(x))
    for _, rows, expert in _experts(layer):
        y[rows], S[rows] = linear_fwd(x[rows], expert, rows.start)
    return y, S


def grouped_lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    layer: Layer,
    S: Tensor | None,
    needs: Needs,
    linear_bwd: Callable[..., Grads] = lora_linear_bwd,
) -> Grads:
    """Gradients of `grouped_lora_linear_fwd`: `lora_linear_bwd` on every segment of rows.

    Args:
        dy: [M, N], x's dtype.
        x: [M, K]; may be None where dA is not asked for.
        layer: as given to the forward.
        S: [M, R]; may be None where dB is not asked for.
        needs: which gradients to compute; a bias has none.
        linear_bwd: runs an expert, in place of `lora_linear_bwd`.

    Returns:
        dx [M, K] in dy's dtype, dA [E, R, K] and dB [E, N, R] in the adapter's dtype. Zeros for
        experts without rows, and for rows without an expert.
    """
    R, K = layer.lora_A.shape[1:]
    dx = dy.new_zeros(dy.shape[0], K) if needs.x else None
    dA = torch.zeros_like(layer.lora_A) if needs.A else None
    dB = torch.zeros_like(layer.lora_B) if needs.B else None
    for e, rows, expert in _experts(layer):
        count = rows.stop - rows.start
        # Not read where they are not needed.
        x_rows = dy.new_empty(count, K) if x is None else x[rows]
        S_rows = dy.new_empty(count, R, dtype=sum_dtype(dy)) if S is None else S[rows]
        grads = linear_bwd(dy[rows], x_rows, expert, S_rows, needs, rows.start)
        for whole, place, grad in ((dx, rows, grads.x), (dA, e, grads.A), (dB, e, grads.B)):
            if whole is not None and grad is not None:
                whole[place] = grad
    return Grads(dx, dA, dB)


def separable(state: QuantState) -> QuantState:
    """`state` for use with `expert`: nested absmax that experts share is decoded."""
    blocks = state.absmax.numel() // state.shape[0]
    if state.state2 is None or blocks % state.state2.blocksize == 0:
        return state
    return replace(state, absmax=dequantize_absmax(state), offset=None, state2=None)


def _experts(layer: Layer) -> Iterator[tuple[int, slice, Layer]]:
    """Each expert that has rows: its number, its rows, and itself as a layer."""
    assert layer.offsets is not None
    weight, state = layer.weight, layer.quant_state
    if state is not None and len(layer.offsets) > 0:
        state = separable(state)
        weight = weight.view(state.shape[0], -1)
    begin = 0
    for e, end in enumerate(layer.offsets.tolist()):
        if end > begin:
            expert = layer._replace(
                weight=weight[e],
                lora_A=layer.lora_A[e],
                lora_B=layer.lora_B[e],
                quant_state=None if state is None else state.expert(e),
                offsets=None,
            )
            yield e, slice(begin, end), expert
        begin = end
