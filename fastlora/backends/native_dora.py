"""The native backend's ops of DoRA: C++ on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..quant import QuantState
from .native_cuda import state_args

ops: Any = torch.ops.fastlora


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`reference.dora_norm`."""
    if weight.numel() == 0:
        return reference.dora_norm(weight, lora_A, lora_B, scaling)
    return ops.dora_norm(weight, lora_A, lora_B, scaling)


def qdora_norm(
    weight: Tensor, quant_state: QuantState, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """`reference.qdora_norm`."""
    if weight.numel() == 0:
        return reference.qdora_norm(weight, quant_state, lora_A, lora_B, scaling)
    state = state_args(quant_state)
    return ops.qdora_norm(weight, *state, quant_state.dtype, lora_A, lora_B, scaling)


def dora_magnitude_fwd(z: Tensor, factor: Tensor, rest: Tensor | None) -> Tensor:
    """`reference.dora_magnitude_fwd`."""
    return ops.dora_magnitude_fwd(z, factor, rest)


def dora_magnitude_bwd(
    dy: Tensor,
    z: Tensor,
    factor: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`reference.dora_magnitude_bwd`."""
    dz, dfactor, drest = ops.dora_magnitude_bwd(dy, z, factor, *needs)
    return dz if needs[0] else None, dfactor if needs[1] else None, drest if needs[2] else None


def dora_dropout_fwd(x: Tensor, dropout_p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.dora_dropout_fwd`."""
    return ops.dora_dropout_fwd(x, dropout_p, seed)


def dora_dropout_bwd(dkept: Tensor, drest: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """`reference.dora_dropout_bwd`."""
    return ops.dora_dropout_bwd(dkept, drest, dropout_p, seed)


def register_fakes() -> None:
    """Shapes without data, for torch.compile."""

    @torch.library.register_fake("fastlora::dora_norm")
    def _(weight, lora_A, lora_B, scaling):  # type: ignore[no-untyped-def]
        return lora_B.new_empty((lora_B.shape[0],), dtype=torch.float32)

    @torch.library.register_fake("fastlora::qdora_norm")
    def _(  # type: ignore[no-untyped-def]
        weight, absmax, code, n_absmax, n_code, n_offset, blocksize, dtype, A, B, scaling
    ):
        return B.new_empty((B.shape[0],), dtype=torch.float32)

    @torch.library.register_fake("fastlora::dora_magnitude_fwd")
    def _(z, factor, rest):  # type: ignore[no-untyped-def]
        return z.new_empty(z.shape)

    @torch.library.register_fake("fastlora::dora_magnitude_bwd")
    def _(dy, z, factor, need_dz, need_dfactor, need_drest):  # type: ignore[no-untyped-def]
        def row(need: bool) -> Tensor:
            return factor.new_empty(factor.shape if need else (0,), dtype=torch.float32)

        dz = z.new_empty(z.shape if need_dz else (0,))
        return dz, row(need_dfactor), row(need_drest)

    @torch.library.register_fake("fastlora::dora_dropout_fwd")
    def _(x, dropout_p, seed):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape), x.new_empty(x.shape)

    @torch.library.register_fake("fastlora::dora_dropout_bwd")
    def _(dkept, drest, dropout_p, seed):  # type: ignore[no-untyped-def]
        return dkept.new_empty(dkept.shape)
