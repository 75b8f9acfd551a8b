"""4-bit weights: quantise and decode, as bitsandbytes does to the bit."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..quant import (
    BLOCKSIZES,
    NESTED_BLOCKSIZE,
    QuantState,
    as_quant_state,
    code_table,
    dynamic_code,
    packed_bytes,
    quantize_bounds,
)

# Below this, the reciprocal of absmax would be infinite.
_ABSMAX_MIN = 1e-38


def quantize_4bit(
    weight: Tensor,
    blocksize: int = 64,
    quant_type: str = "nf4",
    compress_statistics: bool = False,
) -> tuple[Tensor, QuantState]:
    """`nibble[i] = argmin_c |weight[i] / absmax[i // blocksize] - code[c]|`, two to a byte.

    absmax is the largest magnitude of the block. A value midway between two codes gets the lower.
    Bit-exact with bitsandbytes on the CPU: full blocks are multiplied by the reciprocal of absmax,
    a short last block is divided by it; absmax is held above 1e-38 for the scaling, and for a
    short last block also in what is returned.

    Args:
        weight: any shape, fp32, bf16 or fp16.
        blocksize: elements per absmax, one of `quant.BLOCKSIZES`.
        quant_type: "nf4" or "fp4".
        compress_statistics: store absmax in 8 bits (double quantisation).

    Returns:
        The packed bytes, uint8 `[(n + 1) // 2, 1]`, and the state to decode them.

    Raises:
        ValueError: for another blocksize or quant_type.
        TypeError: for another dtype.

    Source: QLoRA, arXiv:2305.14314; bitsandbytes 0.50, `quantize_4bit`.
    """
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight must be fp32, bf16 or fp16, got {weight.dtype}")
    code = code_table(quant_type, weight.device)

    flat = weight.detach().reshape(-1).float()
    n = flat.numel()
    full = n - n % blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * absmax.clamp(min=_ABSMAX_MIN).reciprocal()[:, None]).view(-1)
    if full < n:
        last = flat[full:].abs().max().clamp(min=_ABSMAX_MIN)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, flat[full:] / last])
    if n % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))

    midpoints, order = quantize_bounds(code)
    nibbles = order[torch.bucketize(scaled.clamp(-1, 1), midpoints)].to(torch.uint8)
    packed = (nibbles[::2] << 4 | nibbles[1::2])[:, None]

    state = QuantState(absmax, weight.shape, code, weight.dtype, blocksize, quant_type)
    return packed, nested(state) if compress_statistics else state


def nested(state: QuantState) -> QuantState:
    """`state` with absmax stored in 8 bits: `offset = mean(absmax)`, then `absmax - offset` coded.

    Args:
        state: a state with fp32 absmax.
    """
    offset = state.absmax.mean()
    absmax, state2 = _quantize_absmax(state.absmax - offset)
    return replace(state, absmax=absmax, offset=offset, state2=state2)


def dequantize_4bit(
    packed: Tensor,
    quant_state: QuantState,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`weight[i] = code[nibble[i]] * absmax[i // blocksize]`, an fp32 product rounded once.

    Args:
        packed: `(n + 1) // 2` bytes, any shape, uint8 or a float dtype used as storage.
        quant_state: what `quantize_4bit` returned, or bitsandbytes' own.
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
    """`absmax[b] = state2.code[absmax_u8[b]] * state2.absmax[b // 256] + offset`, when nested.

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


def _quantize_absmax(values: Tensor) -> tuple[Tensor, QuantState]:
    """8-bit codes of `values [nblocks]` on `dynamic_code`, with one absmax per 256 of them.

    bitsandbytes rounds the scaled value to a grid of 2^16 points first (its table has one entry for
    each), then takes the code nearest to that grid point. Where absmax has no finite reciprocal, as
    in an all-zero block, zero gets code 0, not the code of zero.
    """
    code = dynamic_code().to(values.device)
    n = values.numel()
    padded = torch.nn.functional.pad(values, (0, -n % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded * absmax.reciprocal()[:, None]).clamp(-1, 1)
    # A fused multiply-add in fp32: the product is exact in fp64, and the sum is rounded once.
    # NaN is 0 times an infinite reciprocal.
    grid = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float().nan_to_num(0.0).int()
    midpoints = (code[:-1] + code[1:]) * 0.5
    # Divided by a tensor, as CUDA multiplies by the reciprocal of a number.
    nearest = 2.0 * grid.float() / torch.full_like(absmax, 65535)[:, None] - 1.0
    index = torch.bucketize(nearest, midpoints).to(torch.uint8)
    shape = torch.Size((n,))
    state2 = QuantState(absmax, shape, code, torch.float32, NESTED_BLOCKSIZE, "dynamic")
    return index.view(-1)[:n].contiguous(), state2
