"""The 4-bit formats by name, and quant states of peers."""

from __future__ import annotations

from typing import Any

import torch

from .format import Format
from .fp4 import FP4
from .mxfp4 import MXFP4
from .nf4 import NF4
from .state import QuantState

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (NF4, FP4, MXFP4)}
QUANT_TYPES: tuple[str, ...] = tuple(FORMATS)


def find_format(quant_type: str) -> Format:
    """The format of this name.

    Raises:
        ValueError: there is none.
    """
    if quant_type not in FORMATS:
        raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")
    return FORMATS[quant_type]


def as_quant_state(obj: Any) -> QuantState:
    """`obj` as a `QuantState`; tensors are shared, not copied.

    Args:
        obj: a `QuantState`, bitsandbytes' own, or any object with the same attributes.

    Raises:
        TypeError: when an attribute is missing.
        ValueError: for a weight that bitsandbytes has repacked in place for its AVX-512 kernel, for
            an unknown `quant_type`, and for absmax in 8 bits without `state2`.
    """
    if isinstance(obj, QuantState):
        return obj
    if getattr(obj, "packing_format_for_cpu", False):
        raise ValueError(
            "quant_state must have the standard 4-bit layout, got one that bitsandbytes repacked "
            "in place for its AVX-512 kernel (packing_format_for_cpu); load the weight again and "
            "set `support_avx512bf16_for_cpu = False` on every Linear4bit before its first eval "
            "forward"
        )
    names = ("absmax", "shape", "code", "dtype", "blocksize", "quant_type")
    if missing := [name for name in names if not hasattr(obj, name)]:
        raise TypeError(
            f"quant_state must have {', '.join(names)}, "
            f"got {type(obj).__name__} without {', '.join(missing)}"
        )
    if obj.quant_type not in FORMATS:
        raise ValueError(
            f"quant_state.quant_type must be one of {QUANT_TYPES}, got {obj.quant_type!r}"
        )
    inner = getattr(obj, "state2", None)
    offset = getattr(obj, "offset", None)
    if (obj.absmax.dtype == torch.uint8) != (inner is not None and offset is not None):
        raise ValueError(
            "quant_state.absmax must be uint8 with state2 and offset, or floats with neither, "
            f"got {obj.absmax.dtype}, state2 {type(inner).__name__}, offset {type(offset).__name__}"
        )
    state2 = None
    if inner is not None:
        # bitsandbytes leaves the field empty.
        kind = getattr(inner, "quant_type", None) or "dynamic"
        state2 = QuantState(
            inner.absmax, obj.absmax.shape, inner.code, inner.dtype, inner.blocksize, kind
        )
    return QuantState(
        absmax=obj.absmax,
        shape=torch.Size(obj.shape),
        code=obj.code,
        dtype=obj.dtype,
        blocksize=obj.blocksize,
        quant_type=obj.quant_type,
        offset=offset,
        state2=state2,
    )
