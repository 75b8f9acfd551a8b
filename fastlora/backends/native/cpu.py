"""The C++ kernels for CPUs, as torch ops `torch.ops.fastlora.*`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...layer import Grads, Layer, Needs
from ...quant import AbsmaxFormat, QuantState, find_format, quantize_bounds
from ..composed import Composed
from ..contract import Request, asked, is_empty, unsupported_dtype
from ..schemas import flatten, flatten_all, packed
from . import library  # defines torch.ops.fastlora

ops: Any = torch.ops.fastlora
_lora_linear_fwd: Any = ops.lora_linear_fwd.default
_lora_linear_bwd: Any = ops.lora_linear_bwd.default


class Cpu(Composed):
    """The compiled kernels for CPUs."""

    name = "native"

    def unsupported(self, request: Request) -> str | None:
        """One sentence that says why a request can't run on a CPU, or None."""
        if reason := library.unavailable_reason():
            return reason
        if request.device != "cpu":
            return f"{request.op} has no native kernel for device {request.device!r}."
        return unsupported_dtype(request)

    def lora_linear_fwd(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        if is_empty(layer):
            return reference.lora_linear_fwd(x, layer)
        return _lora_linear_fwd(x, *flatten(layer))

    def lora_linear_bwd(
        self, dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs
    ) -> Grads:
        if is_empty(layer):
            return reference.lora_linear_bwd(dy, x, layer, S, needs)
        return asked(_lora_linear_bwd(dy, x, *flatten(layer), S, *needs), needs)

    def shared_linear_fwd(
        self, x: Tensor, layers: Sequence[Layer]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if not _one_call(layers):
            return super().shared_linear_fwd(x, layers)
        ys, Ss = ops.shared_linear_fwd(x, *flatten_all(layers))
        return tuple(ys), tuple(Ss)

    def shared_linear_bwd(
        self,
        dys: Sequence[Tensor | None],
        x: Tensor,
        layers: Sequence[Layer],
        Ss: Sequence[Tensor],
        needs: Sequence[Needs],
    ) -> tuple[Tensor | None, tuple[Grads, ...]]:
        if not _one_call(layers):
            return super().shared_linear_bwd(dys, x, layers, Ss, needs)
        given = [i for i, dy in enumerate(dys) if dy is not None]
        grads = [Grads()] * len(dys)
        if not given:
            return None, tuple(grads)
        need_dx = needs[given[0]].x
        dx, flat = ops.shared_linear_bwd(
            [dys[i] for i in given],
            x,
            *flatten_all([layers[i] for i in given]),
            [Ss[i] for i in given],
            need_dx,
            [int(need) for i in given for need in needs[i][1:]],
        )
        for place, i in enumerate(given):
            own = (x, *flat[3 * place : 3 * place + 3])
            grads[i] = asked(own, needs[i]._replace(x=False))
        return dx if need_dx else None, tuple(grads)

    def grouped_lora_linear_fwd(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        if _empty_stack(layer):
            return reference.grouped_lora_linear_fwd(x, layer)
        return ops.grouped_lora_linear_fwd(x, *_flat_stack(layer), layer.offsets)

    def grouped_lora_linear_bwd(
        self, dy: Tensor, x: Tensor | None, layer: Layer, S: Tensor | None, needs: Needs
    ) -> Grads:
        if _empty_stack(layer):
            return reference.grouped_lora_linear_bwd(dy, x, layer, S, needs)
        grads = ops.grouped_lora_linear_bwd(dy, x, *_flat_stack(layer), layer.offsets, S, *needs)
        return asked(grads, needs)

    def lora_embedding_fwd(self, ids: Tensor, layer: Layer, weight_scale: float = 1.0) -> Tensor:
        table = layer.weight
        if table.numel() == 0:
            return reference.lora_embedding_fwd(ids, layer, weight_scale)
        try:
            return ops.lora_embedding_fwd(
                ids, table, layer.lora_A, layer.lora_B, layer.scaling, weight_scale
            )
        except RuntimeError as error:
            # The binding raises one type for all; torch's own embedding an IndexError for its ids.
            if ((ids < 0) | (ids >= len(table))).any():
                raise IndexError(f"ids must be from 0 to {len(table) - 1}") from error
            raise

    def lora_embedding_bwd(
        self, dy: Tensor, ids: Tensor, layer: Layer, padding_idx: int | None, needs: Needs
    ) -> Grads:
        A, B = layer.lora_A, layer.lora_B
        if A.numel() == 0 or B.numel() == 0:
            return reference.lora_embedding_bwd(dy, ids, layer, padding_idx, needs)
        padding = -1 if padding_idx is None else padding_idx
        dA, dB = ops.lora_embedding_bwd(dy, ids, A, B, layer.scaling, padding, needs.A, needs.B)
        return Grads(None, dA if needs.A else None, dB if needs.B else None)

    def dora_norm(self, layer: Layer) -> Tensor:
        if layer.weight.numel() == 0:
            return reference.dora_norm(layer)
        state = layer.quant_state
        decoded = None if state is None else state.dtype
        return ops.dora_norm(*flatten(layer._replace(compute_dtype=decoded)))

    def dora_magnitude_fwd(self, z: Tensor, factor: Tensor, rest: Tensor | None) -> Tensor:
        return ops.dora_magnitude_fwd(z, factor, rest)

    def dora_magnitude_bwd(
        self, dy: Tensor, z: Tensor, factor: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dz, dfactor, drest = ops.dora_magnitude_bwd(dy, z, factor, *needs)
        return dz if needs[0] else None, dfactor if needs[1] else None, drest if needs[2] else None

    def dora_dropout_fwd(self, x: Tensor, dropout_p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
        return ops.dora_dropout_fwd(x, dropout_p, seed)

    def dora_dropout_bwd(
        self, dkept: Tensor, drest: Tensor, dropout_p: float, seed: Tensor
    ) -> Tensor:
        return ops.dora_dropout_bwd(dkept, drest, dropout_p, seed)

    def quantize_4bit(
        self, weight: Tensor, blocksize: int, quant_type: str, compress_statistics: bool
    ) -> tuple[Tensor, QuantState]:
        return quantized(ops, weight, blocksize, quant_type, compress_statistics)

    def dequantize_4bit(
        self, data: Tensor, quant_state: QuantState, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = torch.empty(quant_state.shape, dtype=dtype, device=data.device)
        ops.dequantize_4bit_out(*packed(data, quant_state), out)
        return out


def _one_call(layers: Sequence[Layer]) -> bool:
    """Whether one kernel takes them all: none is empty, and all are stored in one order."""
    transposed = {not p.weight.is_contiguous() and p.weight.t().is_contiguous() for p in layers}
    return len(transposed) == 1 and not any(is_empty(p) for p in layers)


def _empty_stack(layer: Layer) -> bool:
    return layer.lora_A.shape[0] == 0 or is_empty(layer)


def _flat_stack(layer: Layer) -> tuple[Any, ...]:
    state = layer.quant_state
    if state is not None:
        layer = layer._replace(quant_state=reference.separable(state))
    return flatten(layer)


def quantized(
    ops: Any,
    weight: Tensor,
    blocksize: int,
    quant_type: str,
    compress_statistics: bool,
    nested: Callable[[QuantState], QuantState] = reference.nested,
) -> tuple[Tensor, QuantState]:
    """`reference.quantize_4bit`: by `ops` for bitsandbytes' formats, in plain torch for others.

    Args:
        ops: a library's.
        nested: `reference.nested`, on the library's device.
    """
    fmt = find_format(quant_type)
    if not isinstance(fmt, AbsmaxFormat):
        return fmt.quantize(weight, blocksize, compress_statistics)
    code, device = fmt.table("cpu"), weight.device
    bounds, order = quantize_bounds(code)
    tables = bounds.to(device), order.to(torch.uint8).to(device)
    data, absmax = ops.quantize_4bit(weight.detach(), *tables, blocksize)
    state = QuantState(absmax, weight.shape, code.to(device), weight.dtype, blocksize, fmt.name)
    return data, nested(state) if compress_statistics else state
