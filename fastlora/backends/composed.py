"""Ops of several layers, composed of those of one: for backends without a kernel for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..layer import Grads, Layer, Needs
from ..quant import QuantState
from ..reference import dequantize_absmax, empty_grads, fill, segments

# `lora_linear_fwd` and `lora_linear_bwd` of a backend.
Forward = Callable[[Tensor, Layer], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Layer, Tensor, Needs], Grads]


def shared_linear_fwd(
    forward: Forward, x: Tensor, layers: Sequence[Layer]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`reference.shared_linear_fwd`, layer by layer."""
    results = [forward(x, layer) for layer in layers]
    return tuple(y for y, _ in results), tuple(S for _, S in results)


def shared_linear_bwd(
    backward: Backward,
    dys: Sequence[Tensor | None],
    x: Tensor,
    layers: Sequence[Layer],
    Ss: Sequence[Tensor],
    needs: Sequence[Needs],
) -> tuple[Tensor | None, tuple[Grads, ...]]:
    """`reference.shared_linear_bwd`, layer by layer.

    Each layer rounds its part of dx; their sum is taken in fp32 and rounded once more.
    """
    total: Tensor | None = None
    grads: list[Grads] = []
    for dy, layer, S, need in zip(dys, layers, Ss, needs, strict=True):
        own = Grads() if dy is None else backward(dy, x, layer, S, need)
        grads.append(own._replace(x=None))
        if own.x is None:
            continue
        if total is None:
            total = own.x.to(torch.promote_types(own.x.dtype, torch.float32))
        else:
            total.add_(own.x)
    return None if total is None else total.to(x.dtype), tuple(grads)


def grouped_lora_linear_fwd(forward: Forward, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """`reference.grouped_lora_linear_fwd` without dropout, one call for each expert.

    No slice is copied. Reading offsets on a GPU waits for it once.
    """
    y = x.new_zeros(x.shape[0], layer.lora_B.shape[1])
    S = x.new_zeros(x.shape[0], layer.lora_A.shape[1], dtype=torch.float32)
    for _, rows, expert in _experts(layer):
        y[rows], S[rows] = forward(x[rows], expert)
    return y, S


def grouped_lora_linear_bwd(
    backward: Backward, dy: Tensor, x: Tensor | None, layer: Layer, S: Tensor | None, needs: Needs
) -> Grads:
    """`reference.grouped_lora_linear_bwd` without dropout, one call for each expert."""
    out = empty_grads(dy, layer, needs)
    R, K = layer.lora_A.shape[1:]
    for e, rows, expert in _experts(layer):
        count = rows.stop - rows.start
        x_rows = dy.new_empty(count, K) if x is None else x[rows]
        S_rows = dy.new_empty(count, R, dtype=torch.float32) if S is None else S[rows]
        fill(out, e, rows, backward(dy[rows], x_rows, expert, S_rows, needs))
    return out


def separable(state: QuantState) -> QuantState:
    """`state` for use with `expert`: nested absmax that experts share is decoded."""
    blocks = state.absmax.numel() // state.shape[0]
    if state.state2 is None or blocks % state.state2.blocksize == 0:
        return state
    return replace(state, absmax=dequantize_absmax(state), offset=None, state2=None)


def _experts(layer: Layer) -> Iterator[tuple[int, slice, Layer]]:
    """Each expert that has rows: its number, its rows, and the expert as a layer."""
    assert layer.offsets is not None
    if len(layer.offsets) == 0:
        return
    weight, state = layer.weight, layer.quant_state
    if state is not None:
        state = separable(state)
        weight = weight.view(state.shape[0], -1)
    for e, begin, end in segments(layer.offsets):
        expert = layer._replace(
            weight=weight[e],
            lora_A=layer.lora_A[e],
            lora_B=layer.lora_B[e],
            quant_state=None if state is None else state.expert(e),
            offsets=None,
        )
        yield e, slice(begin, end), expert
