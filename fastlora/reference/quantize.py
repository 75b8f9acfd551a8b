"""4-bit weights: quantise and decode."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant import QuantState, as_quant_state, find_format, packed_bytes


def quantize_4bit(
    weight: Tensor,
    blocksize: int | None = None,
    quant_type: str = "nf4",
    compress_statistics: bool = False,
) -> tuple[Tensor, QuantState]:
    """The `quantize` of the format: `quant.AbsmaxFormat`, or `quant.mxfp4.Mxfp4`.

    Args:
        weight: any shape, fp32, bf16 or fp16; for "mxfp4" the last dimension is a multiple of 32.
        blocksize: elements per scale; the default of the format when None: 64, or 32 for "mxfp4".
        quant_type: "nf4", "fp4" or "mxfp4".
        compress_statistics: store absmax in 8 bits (double quantisation); "nf4" and "fp4" only.

    Returns:
        The packed bytes, uint8 `[(n + 1) // 2, 1]`, and the state to decode them.

    Raises:
        ValueError: no such quant_type, or what the format doesn't have.
        TypeError: another dtype of weight.
    """
    return find_format(quant_type).quantize(weight, blocksize, compress_statistics)


def dequantize_4bit(
    packed: Tensor,
    quant_state: QuantState,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`weight[i] = code[nibble[i]] * absmax[i // blocksize]`, an fp32 product rounded once.

    Args:
        packed: `(n + 1) // 2` bytes, any shape, uint8 or a float dtype used as storage; the first
            of two elements in the high nibble.
        quant_state: from `quantize_4bit`, or bitsandbytes' own.
        dtype: of the result; `out.dtype`, else `quant_state.dtype`, when None. fp64 gives the fp32
            product, widened.
        out: where the result goes; `quant_state.shape`, `dtype`.

    Returns:
        The weight, `quant_state.shape`.

    Raises:
        ValueError: when packed holds too few bytes or out does not fit.

    Source: bitsandbytes 0.50, `dequantize_4bit`.
    """
    state = as_quant_state(quant_state)
    n = state.shape.numel()
    if dtype is None:
        dtype = state.dtype if out is None else out.dtype
    data = packed_bytes(packed)
    if data.numel() < (n + 1) // 2:
        raise ValueError(f"packed must hold {(n + 1) // 2} bytes, got {data.numel()}")
    if out is not None and (out.shape != state.shape or out.dtype != dtype):
        raise ValueError(
            f"out must be {tuple(state.shape)} {dtype}, got {tuple(out.shape)} {out.dtype}"
        )
    nibbles = torch.stack([data >> 4, data & 15], dim=1).view(-1)[:n]
    scale = dequantize_absmax(state).repeat_interleave(state.blocksize)[:n]
    weight = (state.code.float()[nibbles.int()] * scale).view(state.shape).to(dtype)
    return weight if out is None else out.copy_(weight)


def dequantize_absmax(quant_state: QuantState) -> Tensor:
    """`absmax[b] = state2.code[absmax_u8[b]] * state2.absmax[b // 256] + offset`, of 8-bit absmax.

    Product and sum are rounded one after the other, without a fused multiply-add. A plain absmax is
    returned as it is.

    Args:
        quant_state: the state of a 4-bit weight.

    Returns:
        fp32 `[nblocks]`.

    Source: bitsandbytes 0.50, `dequantize_blockwise`.
    """
    state = as_quant_state(quant_state)
    if state.state2 is None or state.offset is None:
        return state.absmax.float()
    inner = state.state2
    scale = inner.absmax.float().repeat_interleave(inner.blocksize)[: state.absmax.numel()]
    return inner.code[state.absmax.int()] * scale + state.offset
