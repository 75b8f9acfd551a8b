"""The Triton backend: one source for every GPU that Triton reaches, and its interpreter on CPUs.

Triton itself is imported when an op first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...layer import Grads, Layer, Needs
from ...quant import QuantState
from ..composed import Composed
from ..contract import Request, asked, is_empty, unsupported_dropout, unsupported_dtype
from ..machine.gpu import interpreted, triton_version, unsupported_gpu
from ..schemas import flatten, packed
from . import library  # defines torch.ops.fastlora_triton

ops: Any = torch.ops.fastlora_triton
_OPS = (
    "lora_linear_fwd",
    "lora_linear_bwd",
    "grouped_lora_linear_fwd",
    "grouped_lora_linear_bwd",
    "dequantize_4bit",
)


def unavailable_reason() -> str | None:
    """One sentence: why Triton can't be used and what helps; None when it can."""
    if triton_version() is None:
        return "triton is not installed; `pip install triton` installs it."
    return None


class Triton(Composed):
    """The Triton kernels, also for the parts of a layer without W: `shrink` and `skinny_bwd`."""

    name = "triton"

    def unsupported(self, request: Request) -> str | None:
        """One sentence that says why a request can't run here, or None."""
        if request.op not in _OPS:
            return f"{request.op} has no Triton kernel."
        if request.device not in ("cpu", "cuda"):
            return f"{request.op} has no Triton kernel for device {request.device!r}."
        if reason := unavailable_reason():
            return reason
        if request.device == "cpu" and not interpreted():
            return (
                "Triton runs on the CPU only in its interpreter: "
                "set TRITON_INTERPRET=1 before Python starts."
            )
        if request.device == "cuda" and (reason := unsupported_gpu(request.device_index)):
            return reason
        return unsupported_dtype(request) or unsupported_dropout(request)

    def lora_linear_fwd(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        if is_empty(layer):
            return reference.lora_linear_fwd(x, layer)
        return ops.lora_linear_fwd(x, *flatten(layer))

    def lora_linear_bwd(
        self, dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs
    ) -> Grads:
        if is_empty(layer):
            return reference.lora_linear_bwd(dy, x, layer, S, needs)
        return asked(ops.lora_linear_bwd(dy, x, *flatten(layer), S, *needs), needs)

    def dequantize_4bit(
        self, data: Tensor, quant_state: QuantState, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = torch.empty(quant_state.shape, dtype=dtype, device=data.device)
        if out.numel():
            ops.dequantize_4bit_out(*packed(data, quant_state), out)
        return out

    def shrink(self, x: Tensor, layer: Layer) -> Tensor:
        return ops.shrink(x, layer.lora_A, layer.dropout_p, layer.seed)

    def skinny_bwd(
        self, dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs
    ) -> tuple[Tensor, Grads]:
        needs = needs._replace(x=False)
        dS, dA, dB, dbias = ops.skinny_bwd(dy, x, *flatten(layer), S, *needs)
        return dS, asked((dS, dA, dB, dbias), needs)


TRITON = Triton()
unsupported = TRITON.unsupported
