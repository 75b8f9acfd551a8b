"""The compiled backend: C++ kernels for CPUs, as torch ops `torch.ops.fastlora.*`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant import QuantState, packed_bytes

NAME = "native"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_build: dict[str, Any] | None
_reason: str | None = None
try:
    from .. import _C

    _build = _C.build_info()
except ImportError as error:
    _build = None
    _reason = (
        f"the compiled library fastlora._C can't be loaded ({error}); "
        "`FASTLORA_NATIVE=1 pip install --no-build-isolation fastlora` builds it."
    )


def build_info() -> dict[str, Any] | None:
    """Compiler, version, instruction sets compiled and chosen; None without the library."""
    return _build


def unavailable_reason() -> str | None:
    """One sentence that says why the library is missing and how to get it; None when it is there."""
    return _reason


def unsupported(
    op: str,
    device: str,
    dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> str | None:
    """One sentence that says why `op` can't run here, or None."""
    if _reason is not None:
        return _reason
    if device != "cpu":
        return f"{op} has no native kernel for device {device!r}."
    for name, given in (("x", dtype), ("lora_A", adapter_dtype), ("compute_dtype", compute_dtype)):
        if given is not None and given not in _DTYPES:
            return f"{op} takes fp32, bf16 and fp16, got {name} in {given}."
    return None


def quantize_4bit(
    weight: Tensor,
    blocksize: int = 64,
    quant_type: str = "nf4",
    compress_statistics: bool = False,
) -> tuple[Tensor, QuantState]:
    """`reference.quantize_4bit`."""
    code = code_table(quant_type)
    packed, absmax = torch.ops.fastlora.quantize_4bit(weight, code, blocksize)
    return finish_quantize(packed, absmax, weight, blocksize, quant_type, compress_statistics)
