"""The differentiable parts of DoRA: `dora_magnitude` and `dora_dropout`. No math stands here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .autograd import autocast_off, draw_seed
from .backends import forced_backend


class DoraMagnitudeFunction(torch.autograd.Function):
    """`y = factor * z + rest`, with gradients for all three, each only where asked for.

    Saves z and factor. The formulas are those of `reference`. A backward that is
    differentiated itself (`create_graph=True`) runs in plain torch.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, factor: Tensor, rest: Tensor | None, backend: str | None
    ) -> Tensor:
        ctx.save_for_backward(z, factor)
        ctx.rest = None if rest is None else (rest.dim(), rest.dtype)
        ctx.backend = backend
        return ops.dora_magnitude_fwd(z, factor, rest, backend=backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        backend = "reference" if torch.is_grad_enabled() else ctx.backend
        z, factor = ctx.saved_tensors
        need_z, need_factor, need_rest, _ = ctx.needs_input_grad
        summed = need_rest and ctx.rest[0] == 1
        with autocast_off(dy.device):
            dz, dfactor, drest = ops.dora_magnitude_bwd(
                dy, z, factor, (need_z, need_factor, summed), backend=backend
            )
        if need_rest:
            drest = (dy if drest is None else drest).to(ctx.rest[1])
        return dz, dfactor, drest, None


class DoraDropoutFunction(torch.autograd.Function):
    """`kept = mask * x`, `rest = x - drop(x)`, with the gradient of x.

    Saves the seed alone. The formulas are those of `reference`. A backward that is
    differentiated itself (`create_graph=True`) runs in plain torch.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seed: Tensor, dropout_p: float, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(seed)
        ctx.options = dropout_p, backend
        return ops.dora_dropout_fwd(x, dropout_p, seed, backend=backend)

    @staticmethod
    def backward(ctx: Any, dkept: Tensor, drest: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        dropout_p, backend = ctx.options
        backend = "reference" if torch.is_grad_enabled() else backend
        with autocast_off(dkept.device):
            dx = ops.dora_dropout_bwd(dkept, drest, dropout_p, seed, backend=backend)
        return dx, None, None, None


def dora_magnitude(
    z: Tensor, factor: Tensor, rest: Tensor | None, *, backend: str | None = None
) -> Tensor:
    """`y = factor * z + rest`, differentiable in all three.

    Args:
        z: [..., N], fp32, bf16 or fp16 (fp64 for checks).
        factor: [N], fp32 (fp64 where z is).
        rest: [N], z's shape, or None; any of z's dtypes.
        backend: "native" or "reference"; the device's best when None.

    Returns:
        y [..., N] in z's dtype, rounded once.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
        RuntimeError: the backend asked for can't run.
    """
    if rest is not None and rest.dim() > 1:
        rest = rest.reshape(-1, rest.shape[-1])
    # The backend is settled now: the backward may run outside of a `use_backend` block.
    args = z.reshape(-1, z.shape[-1]), factor, rest, forced_backend(backend)
    y: Tensor = DoraMagnitudeFunction.apply(*args)
    return y.view(z.shape)


def dora_dropout(
    x: Tensor, dropout_p: float, *, seed: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`kept = mask * x` and `rest = x - drop(x)`, differentiable in x; `drop(x) = scale * kept`.

    Args:
        x: [..., K], fp32, bf16 or fp16 (fp64 for checks).
        dropout_p: probability of dropping an element of x, above 0.
        seed: as in `lora_linear`, whose masks these are.
        backend: "native" or "reference"; the device's best when None.

    Returns:
        kept and rest [..., K] in x's dtype.

    Raises:
        ValueError: dropout_p or the seed does not fit.
        RuntimeError: the backend asked for can't run.
    """
    seed = draw_seed(x, dropout_p, seed)
    args = x.reshape(-1, x.shape[-1]), seed, dropout_p, forced_backend(backend)
    kept, rest = DoraDropoutFunction.apply(*args)
    return kept.view(x.shape), rest.view(x.shape)
