"""The native backend's grouped ops: one C++ call for all experts on the CPU, a loop on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..quant import QuantState
from . import grouped, native_cuda
from .native_cuda import state_args

ops: Any = torch.ops.fastlora


def _empty(lora_A: Tensor, lora_B: Tensor) -> bool:
    """True for a stack without elements: there is nothing for a kernel to do."""
    return lora_A.shape[0] == 0 or lora_A.shape[2] == 0 or lora_B.shape[1] == 0


def _asked(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def grouped_lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.grouped_lora_linear_fwd`."""
    args = (x, weight, offsets, lora_A, lora_B, scaling, dropout_p, seed)
    if _empty(lora_A, lora_B):
        return reference.grouped_lora_linear_fwd(*args)
    return ops.grouped_lora_linear_fwd(*args)


def grouped_lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, ...]:
    """`reference.grouped_lora_linear_bwd`."""
    args = (dy, x, weight, offsets, lora_A, lora_B, S, scaling, dropout_p, seed)
    if _empty(lora_A, lora_B):
        return reference.grouped_lora_linear_bwd(*args, needs)
    return _asked(ops.grouped_lora_linear_bwd(*args, *needs), needs)


def grouped_qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.grouped_qlora_linear_fwd`."""
    lora = (lora_A, lora_B, scaling)
    if x.is_cuda:
        base = (x, weight, quant_state, offsets)
        return grouped.forward(native_cuda, *base, *lora, compute_dtype)
    if _empty(lora_A, lora_B):
        return reference.grouped_qlora_linear_fwd(
            x, weight, quant_state, offsets, *lora, dropout_p, seed, compute_dtype
        )
    state = grouped.separable(quant_state)
    quant = (weight, *state_args(state), compute_dtype or x.dtype)
    return ops.grouped_qlora_linear_fwd(x, *quant, offsets, *lora, dropout_p, seed)


def grouped_qlora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant_state: QuantState,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, ...]:
    """`reference.grouped_qlora_linear_bwd`."""
    lora = (lora_A, lora_B, S, scaling)
    if dy.is_cuda:
        base = (dy, x, weight, quant_state, offsets)
        return grouped.backward(native_cuda, *base, *lora, compute_dtype, needs)
    if _empty(lora_A, lora_B):
        return reference.grouped_qlora_linear_bwd(
            dy, x, weight, quant_state, offsets, *lora, dropout_p, seed, compute_dtype, needs
        )
    state = grouped.separable(quant_state)
    quant = (weight, *state_args(state), compute_dtype or dy.dtype)
    grads = ops.grouped_qlora_linear_bwd(dy, x, *quant, offsets, *lora, dropout_p, seed, *needs)
    return _asked(grads, needs)


def register_fakes() -> None:
    """Shapes without data, for torch.compile."""

    def forward(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        y = x.new_empty((x.shape[0], lora_B.shape[1]))
        return y, x.new_empty((x.shape[0], lora_A.shape[1]), dtype=torch.float32)

    def backward(
        dy: Tensor, lora_A: Tensor, lora_B: Tensor, needs: tuple[bool, ...]
    ) -> tuple[Tensor, ...]:
        shapes = ((dy.shape[0], lora_A.shape[2]), tuple(lora_A.shape), tuple(lora_B.shape))
        dtypes = (dy.dtype, lora_A.dtype, lora_B.dtype)
        unasked = (dy.dtype, torch.float32, torch.float32)
        return tuple(
            dy.new_empty(shape, dtype=dtype) if need else dy.new_empty((0,), dtype=empty)
            for shape, dtype, empty, need in zip(shapes, dtypes, unasked, needs, strict=True)
        )

    @torch.library.register_fake("fastlora::grouped_lora_linear_fwd")
    def _(x, weight, offsets, lora_A, lora_B, *options):  # type: ignore[no-untyped-def]
        return forward(x, lora_A, lora_B)

    @torch.library.register_fake("fastlora::grouped_lora_linear_bwd")
    def _(dy, x, weight, offsets, lora_A, lora_B, *options):  # type: ignore[no-untyped-def]
        return backward(dy, lora_A, lora_B, options[-3:])

    @torch.library.register_fake("fastlora::grouped_qlora_linear_fwd")
    def _(  # type: ignore[no-untyped-def]
        x, weight, absmax, code, n_absmax, n_code, n_offset, blocksize, dtype, ends, A, B, *options
    ):
        return forward(x, A, B)

    @torch.library.register_fake("fastlora::grouped_qlora_linear_bwd")
    def _(  # type: ignore[no-untyped-def]
        dy, x, weight, absmax, code, n_absmax, n_code, n_offset, blocksize, dtype, ends, A, B, *rest
    ):
        return backward(dy, A, B, rest[-3:])
