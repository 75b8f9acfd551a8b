"""The compiled backend, as torch ops `torch.ops.fastlora.*`: C++ kernels for CPUs, and, on CUDA
devices, those that `native_cuda` chooses among.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..quant import AbsmaxFormat, QuantState, find_format, quantize_bounds
from ..reference import Projection
from . import native_cuda, sequence
from .machine import cpu
from .native_cuda import state_args
from .native_dora import (
    dora_dropout_bwd,
    dora_dropout_fwd,
    dora_magnitude_bwd,
    dora_magnitude_fwd,
    dora_norm,
    qdora_norm,
)
from .native_dora import register_fakes as register_dora_fakes
from .native_embedding import lora_embedding_bwd, lora_embedding_fwd
from .native_embedding import register_fakes as register_embedding_fakes
from .native_grouped import (
    grouped_lora_linear_bwd,
    grouped_lora_linear_fwd,
    grouped_qlora_linear_bwd,
    grouped_qlora_linear_fwd,
)
from .native_grouped import register_fakes as register_grouped_fakes

__all__ = [
    "build_info",
    "dequantize_4bit",
    "dora_dropout_bwd",
    "dora_dropout_fwd",
    "dora_magnitude_bwd",
    "dora_magnitude_fwd",
    "dora_norm",
    "grouped_lora_linear_bwd",
    "grouped_lora_linear_fwd",
    "grouped_qlora_linear_bwd",
    "grouped_qlora_linear_fwd",
    "lora_embedding_bwd",
    "lora_embedding_fwd",
    "lora_linear_bwd",
    "lora_linear_fwd",
    "qdora_norm",
    "qlora_linear_bwd",
    "qlora_linear_fwd",
    "quantize_4bit",
    "shared_linear_bwd",
    "shared_linear_fwd",
    "unavailable_reason",
    "unsupported",
]

NAME = "native"

ops: Any = torch.ops.fastlora
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_build: dict[str, Any] | None
_reason: str | None = None
try:
    from .. import _C

    _build = _C.build_info()
    cpu.use_tuned(_C)
except ImportError as error:
    _build = None
    _reason = (
        f"the compiled library fastlora._C can't be loaded ({error}); "
        "in fastlora's source folder, `FASTLORA_NATIVE=1 pip install --no-build-isolation .` "
        "builds it."
    )


def build_info() -> dict[str, Any] | None:
    """Compiler, version, instruction sets compiled and chosen; None without the library."""
    return _build


def unavailable_reason() -> str | None:
    """One sentence: why the library is missing and how to get it; None when it is there."""
    return _reason


def unsupported(
    op: str,
    device: str,
    dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    index: int | None = None,
    dropout_p: float = 0.0,
) -> str | None:
    """One sentence that says why `op` can't run here, or None."""
    if _reason is not None:
        return _reason
    if device == "cuda":
        dtypes = (dtype, adapter_dtype, compute_dtype)
        return native_cuda.unsupported(op, index, *dtypes, dropout_p=dropout_p)
    if device != "cpu":
        return f"{op} has no native kernel for device {device!r}."
    for name, given in (("x", dtype), ("lora_A", adapter_dtype), ("compute_dtype", compute_dtype)):
        if given is not None and given not in _DTYPES:
            return f"{op} takes fp32, bf16 and fp16, got {name} in {given}."
    return None


def _empty(x: Tensor, lora_B: Tensor) -> bool:
    """True for a weight without elements: there is nothing for a kernel to do."""
    return x.shape[1] == 0 or lora_B.shape[0] == 0


def _asked(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.lora_linear_fwd`."""
    if _empty(x, lora_B):
        return reference.lora_linear_fwd(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    return ops.lora_linear_fwd(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
) -> tuple[Tensor | None, ...]:
    """`reference.lora_linear_bwd`."""
    if _empty(x, lora_B):
        return reference.lora_linear_bwd(
            dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, needs
        )
    grads = ops.lora_linear_bwd(dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, *needs)
    return _asked(grads, needs)


def qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.qlora_linear_fwd`."""
    if _empty(x, lora_B):
        return reference.qlora_linear_fwd(
            x, weight, quant_state, bias, lora_A, lora_B, scaling, dropout_p, seed, compute_dtype
        )
    if x.is_cuda:
        return native_cuda.qlora_linear_fwd(
            x, weight, quant_state, bias, lora_A, lora_B, scaling, dropout_p, seed, compute_dtype
        )
    return ops.qlora_linear_fwd(
        x,
        weight,
        *state_args(quant_state),
        compute_dtype or x.dtype,
        bias,
        lora_A,
        lora_B,
        scaling,
        dropout_p,
        seed,
    )


def qlora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
) -> tuple[Tensor | None, ...]:
    """`reference.qlora_linear_bwd`."""
    if _empty(x, lora_B):
        return reference.qlora_linear_bwd(
            dy,
            x,
            weight,
            quant_state,
            lora_A,
            lora_B,
            S,
            scaling,
            dropout_p,
            seed,
            compute_dtype,
            needs,
        )
    if x.is_cuda:
        return native_cuda.qlora_linear_bwd(
            dy,
            x,
            weight,
            quant_state,
            lora_A,
            lora_B,
            S,
            scaling,
            dropout_p,
            seed,
            compute_dtype,
            needs,
        )
    grads = ops.qlora_linear_bwd(
        dy,
        x,
        weight,
        *state_args(quant_state),
        compute_dtype or x.dtype,
        lora_A,
        lora_B,
        S,
        scaling,
        dropout_p,
        seed,
        *needs,
    )
    return _asked(grads, needs)


def shared_linear_fwd(
    x: Tensor, projections: Sequence[Projection]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`reference.shared_linear_fwd`."""
    if x.is_cuda or not _one_call(x, projections):
        return sequence.shared_linear_fwd(sys.modules[__name__], x, projections)
    ys, Ss = ops.shared_linear_fwd(x, *_layers(x, projections), *_numbers(projections))
    return tuple(ys), tuple(Ss)


def shared_linear_bwd(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    Ss: Sequence[Tensor],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
) -> tuple[Tensor | None, tuple[tuple[Tensor | None, ...], ...]]:
    """`reference.shared_linear_bwd`."""
    if x.is_cuda or not _one_call(x, projections):
        return sequence.shared_linear_bwd(
            sys.modules[__name__], dys, x, projections, Ss, need_dx, needs
        )
    given = [i for i, dy in enumerate(dys) if dy is not None]
    grads: list[tuple[Tensor | None, ...]] = [(None, None, None)] * len(dys)
    if not given:
        return None, tuple(grads)
    some = [projections[i] for i in given]
    dx, flat = ops.shared_linear_bwd(
        [dys[i] for i in given],
        x,
        *_layers(x, some),
        [Ss[i] for i in given],
        *_numbers(some),
        need_dx,
        [int(need) for i in given for need in needs[i]],
    )
    for place, i in enumerate(given):
        grads[i] = _asked(tuple(flat[3 * place : 3 * place + 3]), needs[i])
    return dx if need_dx else None, tuple(grads)


def _one_call(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether one kernel takes them all: none is empty, and all are stored in one order."""
    turned = {not p.weight.is_contiguous() and p.weight.t().is_contiguous() for p in projections}
    return len(turned) == 1 and not any(_empty(x, p.lora_B) for p in projections)


def _layers(x: Tensor, projections: Sequence[Projection]) -> tuple[Any, ...]:
    """Tensors and blocksizes of several layers, and their compute dtype, as the ops take them."""
    tensors: list[Tensor | None] = []
    blocksizes = []
    for p in projections:
        stats: tuple[Any, ...] = (None,) * 5 + (0,)
        if p.quant_state is not None:
            stats = state_args(p.quant_state)
        tensors += [p.weight, p.lora_A, p.lora_B, p.bias, p.seed, *stats[:-1]]
        blocksizes.append(stats[-1])
    return tensors, blocksizes, projections[0].compute_dtype or x.dtype


def _numbers(projections: Sequence[Projection]) -> tuple[list[float], list[float]]:
    return [p.scaling for p in projections], [p.dropout_p for p in projections]


def quantize_4bit(
    weight: Tensor,
    blocksize: int | None = None,
    quant_type: str = "nf4",
    compress_statistics: bool = False,
) -> tuple[Tensor, QuantState]:
    """`reference.quantize_4bit`: a kernel for bitsandbytes' formats, plain torch for the others."""
    fmt = find_format(quant_type)
    if not isinstance(fmt, AbsmaxFormat):
        return fmt.quantize(weight, blocksize, compress_statistics)
    blocksize = blocksize or fmt.blocksize
    code, device = fmt.table("cpu"), weight.device
    bounds, order = quantize_bounds(code)
    tables = bounds.to(device), order.to(torch.uint8).to(device)
    packed, absmax = ops.quantize_4bit(weight.detach(), *tables, blocksize)
    state = QuantState(absmax, weight.shape, code.to(device), weight.dtype, blocksize, quant_type)
    return packed, _nested(state) if compress_statistics else state


def _nested(state: QuantState) -> QuantState:
    return native_cuda.nested(state) if state.absmax.is_cuda else reference.nested(state)


def dequantize_4bit(
    packed: Tensor,
    quant_state: QuantState,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.dequantize_4bit`."""
    if out is None:
        out = torch.empty(quant_state.shape, dtype=dtype or quant_state.dtype, device=packed.device)
    ops.dequantize_4bit_out(packed, *state_args(quant_state), out)
    return out


# ---- shapes without data, for torch.compile ----------------------------------------------------


def _fake_fwd(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], lora_B.shape[0]))
    return y, x.new_empty((x.shape[0], lora_A.shape[0]), dtype=torch.float32)


def _fake_bwd(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    shapes = (tuple(x.shape), tuple(lora_A.shape), tuple(lora_B.shape), (lora_B.shape[0],))
    dtypes = (x.dtype, lora_A.dtype, lora_B.dtype, torch.float32)
    unasked = (x.dtype, torch.float32, torch.float32, torch.float32)
    return tuple(
        x.new_empty(shape, dtype=dtype) if need else x.new_empty((0,), dtype=empty)
        for shape, dtype, empty, need in zip(shapes, dtypes, unasked, needs, strict=True)
    )


def _adapters(layers: Sequence[Tensor], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """lora_A and lora_B of each of `count` layers, out of what `_layers` makes."""
    fields = len(layers) // count
    return zip(layers[1::fields], layers[2::fields], strict=True)


def _register_fakes() -> None:
    @torch.library.register_fake("fastlora::lora_linear_fwd")
    def _(x, weight, bias, lora_A, lora_B, *options):  # type: ignore[no-untyped-def]
        return _fake_fwd(x, lora_A, lora_B)

    @torch.library.register_fake("fastlora::qlora_linear_fwd")
    def _(  # type: ignore[no-untyped-def]
        x, weight, absmax, code, n_absmax, n_code, n_offset, blocksize, dtype, bias, A, B, *options
    ):
        return _fake_fwd(x, A, B)

    @torch.library.register_fake("fastlora::lora_linear_bwd")
    def _(dy, x, weight, lora_A, lora_B, S, *options):  # type: ignore[no-untyped-def]
        return _fake_bwd(x, lora_A, lora_B, options[-4:])

    @torch.library.register_fake("fastlora::qlora_linear_bwd")
    def _(  # type: ignore[no-untyped-def]
        dy, x, weight, absmax, code, n_absmax, n_code, n_offset, blocksize, dtype, A, B, *options
    ):
        return _fake_bwd(x, A, B, options[-4:])

    @torch.library.register_fake("fastlora::shared_linear_fwd")
    def _(x, layers, *options):  # type: ignore[no-untyped-def]
        pairs = [_fake_fwd(x, A, B) for A, B in _adapters(layers, len(options[-1]))]
        return [y for y, _ in pairs], [S for _, S in pairs]

    @torch.library.register_fake("fastlora::shared_linear_bwd")
    def _(dys, x, layers, blocksizes, dtype, Ss, scalings, dropouts, need_dx, needs):  # type: ignore[no-untyped-def]
        grads, dx = [], None
        for i, (A, B) in enumerate(_adapters(layers, len(dys))):
            asked = (need_dx, *(bool(need) for need in needs[3 * i : 3 * i + 3]))
            dx, *rest = _fake_bwd(x, A, B, asked)
            grads += rest
        return dx, grads

    @torch.library.register_fake("fastlora::quantize_4bit")
    def _(weight, bounds, order, blocksize):  # type: ignore[no-untyped-def]
        n = weight.numel()
        packed = weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
        return packed, weight.new_empty(((n + blocksize - 1) // blocksize,), dtype=torch.float32)

    @torch.library.register_fake("fastlora::dequantize_4bit_out")
    def _(weight, absmax, code, n_absmax, n_code, n_offset, blocksize, out):  # type: ignore[no-untyped-def]
        return None


if _build is not None:
    _register_fakes()
    register_grouped_fakes()
    register_embedding_fakes()
    register_dora_fakes()
