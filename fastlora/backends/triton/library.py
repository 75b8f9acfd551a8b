"""The ops `torch.ops.fastlora_triton.*`: schemas, shapes without data, and the kernels behind them.

They have the names and arguments of the native ops. `shrink` and `skinny_bwd` are the parts of a
layer that touch no W, for products of W that come from elsewhere. Triton is imported when one of
them first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native import _fake_bwd, _fake_fwd

_LORA = "Tensor lora_A, Tensor lora_B"
_DROPOUT = "float scaling, float dropout_p, Tensor? seed"
_NEEDS = "bool need_dx, bool need_dA, bool need_dB, bool need_dbias"
_QUANT = (
    "Tensor weight, Tensor absmax, Tensor code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, int blocksize"
)
_GRADS = "(Tensor dx, Tensor dA, Tensor dB, Tensor dbias)"

SCHEMAS = (
    f"lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, {_LORA}, {_DROPOUT})"
    " -> (Tensor y, Tensor S)",
    f"lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, {_LORA}, Tensor S, {_DROPOUT}, {_NEEDS})"
    f" -> {_GRADS}",
    f"qlora_linear_fwd(Tensor x, {_QUANT}, ScalarType compute_dtype, Tensor? bias, {_LORA}, "
    f"{_DROPOUT}) -> (Tensor y, Tensor S)",
    f"qlora_linear_bwd(Tensor dy, Tensor x, {_QUANT}, ScalarType compute_dtype, {_LORA}, "
    f"Tensor S, {_DROPOUT}, {_NEEDS}) -> {_GRADS}",
    f"dequantize_4bit_out({_QUANT}, Tensor(a!) out) -> ()",
    "shrink(Tensor x, Tensor lora_A, float dropout_p, Tensor? seed) -> Tensor",
    f"skinny_bwd(Tensor dy, Tensor x, {_LORA}, Tensor S, {_DROPOUT}, bool need_dA, bool need_dB, "
    "bool need_dbias) -> (Tensor dS, Tensor dA, Tensor dB, Tensor dbias)",
)


def _filled(grads: tuple[Tensor | None, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Gradients as an op returns them: an empty tensor for what was not asked for."""
    dtypes = (x.dtype, torch.float32, torch.float32, torch.float32)
    return tuple(
        x.new_empty((0,), dtype=dtype) if grad is None else grad
        for grad, dtype in zip(grads, dtypes, strict=True)
    )


def lora_linear_fwd(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`reference.lora_linear_fwd`."""
    from . import launch, lora_linear

    return lora_linear.lora_linear_fwd(launch.launcher(x), x, *rest)


def lora_linear_bwd(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`reference.lora_linear_bwd`."""
    from . import launch, lora_linear

    args: tuple[Any, ...] = (dy, x, *rest[:-4], rest[-4:])
    return _filled(lora_linear.lora_linear_bwd(launch.launcher(x), *args), x)


def qlora_linear_fwd(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`reference.qlora_linear_fwd`; the quant state comes as its seven fields."""
    from . import launch, qlora_linear
    from .kernels import dequantize_4bit

    packed = dequantize_4bit.Packed(*rest[:7])
    return qlora_linear.qlora_linear_fwd(launch.launcher(x), x, packed, *rest[7:])


def qlora_linear_bwd(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`reference.qlora_linear_bwd`; the quant state comes as its seven fields."""
    from . import launch, qlora_linear
    from .kernels import dequantize_4bit

    packed = dequantize_4bit.Packed(*rest[:7])
    args: tuple[Any, ...] = (dy, x, packed, *rest[7:-4], rest[-4:])
    return _filled(qlora_linear.qlora_linear_bwd(launch.launcher(x), *args), x)


def dequantize_4bit_out(weight: Tensor, *rest: Any) -> None:
    """`reference.dequantize_4bit` into `out`, the last argument."""
    from . import launch
    from .kernels import dequantize_4bit

    packed, out = dequantize_4bit.Packed(weight, *rest[:-1]), rest[-1]
    dequantize_4bit.dequantize_4bit(launch.launcher(weight), packed, out)


def shrink(x: Tensor, *rest: Any) -> Tensor:
    """`reference.shrink`."""
    from . import launch, lora_linear

    return lora_linear.tokens_times_A(launch.launcher(x), x, *rest)


def skinny_bwd(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`reference.skinny_bwd`."""
    from . import launch, lora_linear

    args: tuple[Any, ...] = (dy, x, *rest[:-3], (True, *rest[-3:]))
    dS, *grads = lora_linear.skinny_bwd(launch.launcher(x), *args)
    # An op may not return what it was given.
    S = rest[2]
    dS = S.new_zeros(S.shape) if dS is S else dS
    return dS, *_filled((None, *grads), x)[1:]


_LIBRARY = torch.library.Library("fastlora_triton", "DEF")
for _schema in SCHEMAS:
    _LIBRARY.define(_schema)
for _key in ("CPU", "CUDA"):
    for _kernel in (
        lora_linear_fwd,
        lora_linear_bwd,
        qlora_linear_fwd,
        qlora_linear_bwd,
        dequantize_4bit_out,
        shrink,
        skinny_bwd,
    ):
        _LIBRARY.impl(_kernel.__name__, _kernel, _key)


@torch.library.register_fake("fastlora_triton::lora_linear_fwd")
def _(x, weight, bias, lora_A, lora_B, *options):  # type: ignore[no-untyped-def]
    return _fake_fwd(x, lora_A, lora_B)


@torch.library.register_fake("fastlora_triton::lora_linear_bwd")
def _(dy, x, weight, lora_A, lora_B, S, *options):  # type: ignore[no-untyped-def]
    return _fake_bwd(x, lora_A, lora_B, options[-4:])


@torch.library.register_fake("fastlora_triton::qlora_linear_fwd")
def _(x, *rest):  # type: ignore[no-untyped-def]
    return _fake_fwd(x, rest[9], rest[10])


@torch.library.register_fake("fastlora_triton::qlora_linear_bwd")
def _(dy, x, *rest):  # type: ignore[no-untyped-def]
    return _fake_bwd(x, rest[8], rest[9], rest[-4:])


@torch.library.register_fake("fastlora_triton::dequantize_4bit_out")
def _(weight, *rest):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("fastlora_triton::shrink")
def _(x, lora_A, *options):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], lora_A.shape[0]), dtype=torch.float32)


@torch.library.register_fake("fastlora_triton::skinny_bwd")
def _(dy, x, lora_A, lora_B, S, scaling, dropout_p, seed, *needs):  # type: ignore[no-untyped-def]
    grads = _fake_bwd(x, lora_A, lora_B, (False, *needs))[1:]
    return x.new_empty((x.shape[0], lora_A.shape[0]), dtype=torch.float32), *grads
