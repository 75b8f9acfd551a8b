"""A backend: the reference's ops, a name, and a reason for each request it can't run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import reference
from ..layer import Grads, Layer, Needs
from ..quant import QuantState

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Request(NamedTuple):
    """An op, described for `unsupported` before it is called.

    Args:
        op: its name in `reference`.
        device: torch device type, "cpu" or "cuda".
        device_index: of a GPU; torch's current one when None.
        dtype: of x.
        adapter_dtype: of A and B.
        compute_dtype: of the base product, if it isn't x's.
        four_bit: the base is in 4 bits.
        dropout: the call drops elements of x.
    """

    op: str
    device: str
    device_index: int | None = None
    dtype: torch.dtype | None = None
    adapter_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    four_bit: bool = False
    dropout: bool = False

    @classmethod
    def of(cls, op: str, x: Tensor, layer: Layer) -> Request:
        """What `op` asks for a layer and x."""
        device = x.device
        return cls(
            op,
            device.type,
            device.index,
            x.dtype,
            layer.lora_A.dtype,
            layer.compute_dtype,
            layer.quant_state is not None,
            layer.dropout_p > 0.0,
        )


class Backend:
    """Runs ops under the names of `reference`, whose formulas and arguments are theirs.

    Here each op is the reference's: at plain torch's speed, on any device and dtype. A backend
    replaces those it has a kernel for, and its `unsupported` declines the others.
    """

    name = "reference"

    def unsupported(self, request: Request) -> str | None:
        """One sentence that says why the backend can't run a request, or None."""
        return None

    def on(self, device: str) -> Backend:
        """The backend that its name stands for on a torch device type."""
        return self

    def lora_linear_fwd(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        return reference.lora_linear_fwd(x, layer)

    def lora_linear_bwd(
        self, dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs
    ) -> Grads:
        return reference.lora_linear_bwd(dy, x, layer, S, needs)

    def shared_linear_fwd(
        self, x: Tensor, layers: Sequence[Layer]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return reference.shared_linear_fwd(x, layers)

    def shared_linear_bwd(
        self,
        dys: Sequence[Tensor | None],
        x: Tensor,
        layers: Sequence[Layer],
        Ss: Sequence[Tensor],
        needs: Sequence[Needs],
    ) -> tuple[Tensor | None, tuple[Grads, ...]]:
        return reference.shared_linear_bwd(dys, x, layers, Ss, needs)

    def grouped_lora_linear_fwd(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        return reference.grouped_lora_linear_fwd(x, layer)

    def grouped_lora_linear_bwd(
        self, dy: Tensor, x: Tensor | None, layer: Layer, S: Tensor | None, needs: Needs
    ) -> Grads:
        return reference.grouped_lora_linear_bwd(dy, x, layer, S, needs)

    def lora_embedding_fwd(self, ids: Tensor, layer: Layer, weight_scale: float) -> Tensor:
        return reference.lora_embedding_fwd(ids, layer, weight_scale)

    def lora_embedding_bwd(
        self, dy: Tensor, ids: Tensor, layer: Layer, padding_idx: int | None, needs: Needs
    ) -> Grads:
        return reference.lora_embedding_bwd(dy, ids, layer, padding_idx, needs)

    def dora_norm(self, layer: Layer) -> Tensor:
        return reference.dora_norm(layer)

    def dora_magnitude_fwd(self, z: Tensor, factor: Tensor, rest: Tensor | None) -> Tensor:
        return reference.dora_magnitude_fwd(z, factor, rest)

    def dora_magnitude_bwd(
        self, dy: Tensor, z: Tensor, factor: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return reference.dora_magnitude_bwd(dy, z, factor, needs)

    def dora_dropout_fwd(self, x: Tensor, dropout_p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
        return reference.dora_dropout_fwd(x, dropout_p, seed)

    def dora_dropout_bwd(
        self, dkept: Tensor, drest: Tensor, dropout_p: float, seed: Tensor
    ) -> Tensor:
        return reference.dora_dropout_bwd(dkept, drest, dropout_p, seed)

    def quantize_4bit(
        self, weight: Tensor, blocksize: int, quant_type: str, compress_statistics: bool
    ) -> tuple[Tensor, QuantState]:
        return reference.quantize_4bit(weight, blocksize, quant_type, compress_statistics)

    def dequantize_4bit(
        self, data: Tensor, quant_state: QuantState, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        return reference.dequantize_4bit(data, quant_state, dtype, out)


class Entry(Protocol):
    """What a name stands for: a backend, or a package with one for each kind of device."""

    def unsupported(self, request: Request, /) -> str | None:
        """As `Backend.unsupported`."""

    def on(self, device: str, /) -> Backend:
        """As `Backend.on`."""


def unsupported_dtype(request: Request) -> str | None:
    """Why no kernel takes the dtypes of a request, or None."""
    for name, dtype in (
        ("x", request.dtype),
        ("lora_A", request.adapter_dtype),
        ("compute_dtype", request.compute_dtype),
    ):
        if dtype is not None and dtype not in KERNEL_DTYPES:
            return f"{request.op} takes fp32, bf16 and fp16, got {name} in {dtype}."
    return None


def unsupported_dropout(request: Request) -> str | None:
    """Why the experts of a request can't run one by one, or None."""
    if request.op.startswith("grouped_") and request.dropout:
        return (
            f"{request.op} has no kernel whose dropout counts rows from the first of all experts."
        )
    return None


def is_empty(layer: Layer) -> bool:
    """True for a weight without elements, for which no kernel is called."""
    return layer.lora_A.shape[-1] == 0 or layer.lora_B.shape[-2] == 0


def asked(grads: Sequence[Tensor], needs: Needs) -> Grads:
    """The gradients that an op returned, with None in place of those not asked for."""
    return Grads(*(grad if need else None for grad, need in zip(grads, needs, strict=True)))
