"""4-bit weights: quantise and decode."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from ..backends.contract import Request
from ..quant import QuantState, as_quant_state, find_format, packed_bytes
from .checks import check_apart, check_bytes, check_devices


def quantize_4bit(
    weight: Tensor,
    blocksize: int | None = None,
    quant_type: str = "nf4",
    compress_statistics: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, QuantState]:
    """Packed 4-bit codes and quant state of `weight`; see `reference.quantize_4bit`.

    Raises:
        ValueError: no such quant_type, or what the format doesn't have.
        TypeError: weight is not fp32, bf16 or fp16.
    """
    blocksize = find_format(quant_type).check(weight, blocksize, compress_statistics)
    place = weight.device
    b = choose(Request("quantize_4bit", place.type, place.index, weight.dtype), backend)
    return b.quantize_4bit(weight, blocksize, quant_type, compress_statistics)


def dequantize_4bit(
    packed: Tensor,
    quant_state: QuantState,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`code[q] * absmax` in `dtype`; see `reference.dequantize_4bit`.

    Args:
        out: tensor of quant_state.shape and the output dtype, written and returned. Reusing one
            spares the page faults of fresh memory.

    Raises:
        ValueError: packed or out has the wrong size, the tensors are on several devices, or out
            shares memory with them. TypeError: out has the wrong dtype.
    """
    state = as_quant_state(quant_state)
    dtype = dtype or (out.dtype if out is not None else state.dtype)
    packed = packed_bytes(packed)
    check_bytes(packed, state)
    parts = [("quant_state's tensors", tensor) for tensor in state.tensors()]
    check_devices("packed's", packed.device, *parts, ("out", out))
    if out is not None and (tuple(out.shape) != tuple(state.shape) or not out.is_contiguous()):
        raise ValueError(
            f"out must be contiguous with shape {tuple(state.shape)}, got shape "
            f"{tuple(out.shape)} with strides {out.stride()}"
        )
    if out is not None and out.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, got {out.dtype}")
    if out is not None:
        check_apart("out", out, ("packed", packed), *parts)
    place = packed.device
    b = choose(Request("dequantize_4bit", place.type, place.index, dtype), backend)
    return b.dequantize_4bit(packed, state, dtype, out)
