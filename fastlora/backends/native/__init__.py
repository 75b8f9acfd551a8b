"""The compiled backend: C++ kernels on CPUs, CUDA C++ kernels for 4-bit layers on GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...layer import Grads, Layer, Needs
from ...quant import QuantState
from ..contract import Request, unsupported_dtype
from . import cpu, cuda
from .cpu import (
    dora_dropout_bwd as dora_dropout_bwd,
)
from .cpu import (
    dora_dropout_fwd as dora_dropout_fwd,
)
from .cpu import (
    dora_magnitude_bwd as dora_magnitude_bwd,
)
from .cpu import (
    dora_magnitude_fwd as dora_magnitude_fwd,
)
from .cpu import (
    dora_norm as dora_norm,
)
from .cpu import (
    lora_embedding_bwd as lora_embedding_bwd,
)
from .cpu import (
    lora_embedding_fwd as lora_embedding_fwd,
)
from .library import build_info as build_info
from .library import unavailable_reason as unavailable_reason

NAME = "native"


def unsupported(request: Request) -> str | None:
    """One sentence that says why a request can't run here, or None."""
    if request.device == "cuda":
        return cuda.unsupported(request)
    if reason := unavailable_reason():
        return reason
    if request.device != "cpu":
        return f"{request.op} has no native kernel for device {request.device!r}."
    return unsupported_dtype(request)


def lora_linear_fwd(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """`reference.lora_linear_fwd`."""
    return (cuda if x.is_cuda else cpu).lora_linear_fwd(x, layer)


def lora_linear_bwd(dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs) -> Grads:
    """`reference.lora_linear_bwd`."""
    return (cuda if x.is_cuda else cpu).lora_linear_bwd(dy, x, layer, S, needs)


def shared_linear_fwd(
    x: Tensor, layers: Sequence[Layer]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`reference.shared_linear_fwd`."""
    return (cuda if x.is_cuda else cpu).shared_linear_fwd(x, layers)


def shared_linear_bwd(
    dys: Sequence[Tensor | None],
    x: Tensor,
    layers: Sequence[Layer],
    Ss: Sequence[Tensor],
    needs: Sequence[Needs],
) -> tuple[Tensor | None, tuple[Grads, ...]]:
    """`reference.shared_linear_bwd`."""
    return (cuda if x.is_cuda else cpu).shared_linear_bwd(dys, x, layers, Ss, needs)


def grouped_lora_linear_fwd(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """`reference.grouped_lora_linear_fwd`."""
    return (cuda if x.is_cuda else cpu).grouped_lora_linear_fwd(x, layer)


def grouped_lora_linear_bwd(
    dy: Tensor, x: Tensor | None, layer: Layer, S: Tensor | None, needs: Needs
) -> Grads:
    """`reference.grouped_lora_linear_bwd`."""
    return (cuda if dy.is_cuda else cpu).grouped_lora_linear_bwd(dy, x, layer, S, needs)


def quantize_4bit(
    weight: Tensor, blocksize: int, quant_type: str, compress_statistics: bool
) -> tuple[Tensor, QuantState]:
    """`reference.quantize_4bit`."""
    return (cuda if weight.is_cuda else cpu).quantize_4bit(
        weight, blocksize, quant_type, compress_statistics
    )


def dequantize_4bit(
    data: Tensor, quant_state: QuantState, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """`reference.dequantize_4bit`."""
    return (cuda if data.is_cuda else cpu).dequantize_4bit(data, quant_state, dtype, out)
