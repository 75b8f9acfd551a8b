"""The differentiable parts of DoRA: `dora_magnitude`, and `dora_dropout_linear` for training with
dropout. No math stands here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .autograd import (
    autocast_off,
    differentiable_gradients,
    draw_seed,
    linear_bwd,
    linear_fwd,
)
from .backends import forced_backend
from .quant import QuantState
from .reference import dropout_threshold
from .reference.precision import sum_dtype


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


class DoraDropoutLinearFunction(torch.autograd.Function):
    """`dora_dropout_linear`, with gradients for x, bias, lora_A, lora_B and factor, each only where
    asked for.

    Saves x, S [M, R], the adapters, factor, the seed and, where factor is trained, the product
    [M, N] that it multiplies: no mask, no copy of x. A backward that is differentiated itself
    (`create_graph=True`) runs in plain torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        factor: Tensor,
        seed: Tensor,
        scaling: float,
        dropout_p: float,
        quant_state: QuantState | None,
        compute_dtype: torch.dtype | None,
        backend: str | None,
    ) -> Tensor:
        options = (scaling, dropout_p, quant_state, compute_dtype, backend)
        y, z, S = _dropout_linear(x, weight, bias, lora_A, lora_B, factor, seed, *options)
        product = z if ctx.needs_input_grad[5] else None
        stats = () if quant_state is None else quant_state.tensors()
        ctx.save_for_backward(x, weight, lora_A, lora_B, factor, seed, S, product, *stats)
        ctx.state = None if quant_state is None else quant_state.without_tensors()
        ctx.options = (scaling, dropout_p, compute_dtype, backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, factor, seed, S, z, *stats = ctx.saved_tensors
        scaling, dropout_p, compute_dtype, backend = ctx.options
        need_x, _, need_bias, need_A, need_B, need_factor = ctx.needs_input_grad[:6]
        state = None if ctx.state is None else ctx.state.with_tensors(*stats)
        needs = need_x, need_A, need_B, need_factor, need_bias
        dbias: Tensor | None
        with autocast_off(dy.device):
            if torch.is_grad_enabled():
                options = (scaling, dropout_p, state, compute_dtype, "reference")
                dx, dA, dB, dfactor = differentiable_gradients(
                    lambda x, A, B, f: _dropout_linear(x, weight, None, A, B, f, seed, *options)[
                        :1
                    ],
                    (x, lora_A, lora_B, factor),
                    needs[:4],
                    (dy,),
                )
                dbias = dy.sum(0, dtype=sum_dtype(dy)) if need_bias else None
            else:
                saved = (x, weight, lora_A, lora_B, factor, seed, S, z)
                options = (scaling, dropout_p, state, compute_dtype, backend)
                dx, dA, dB, dfactor, dbias = _dropout_linear_bwd(dy, *saved, *options, needs)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return dx, None, dbias, dA, dB, dfactor, None, None, None, None, None, None


def _dropout_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    factor: Tensor,
    seed: Tensor,
    scaling: float,
    dropout_p: float,
    state: QuantState | None,
    compute_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y of `dora_dropout_linear`, the product z that scale * factor multiplies, and S."""
    kept, rest = ops.dora_dropout_fwd(x, dropout_p, seed, backend=backend)
    last = (state, compute_dtype, backend)
    z, S = linear_fwd(kept, weight, None, lora_A, lora_B, None, scaling, 0.0, *last)
    no_A, no_B = _no_adapter(lora_A, lora_B)
    left, _ = linear_fwd(rest, weight, bias, no_A, no_B, None, 0.0, 0.0, *last)
    scaled, _ = _scaled(factor, dropout_p)
    return ops.dora_magnitude_fwd(z, scaled, left, backend=backend), z, S


def _dropout_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    factor: Tensor,
    seed: Tensor,
    S: Tensor,
    z: Tensor | None,
    scaling: float,
    dropout_p: float,
    state: QuantState | None,
    compute_dtype: torch.dtype | None,
    backend: str | None,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """dx, dA, dB, dfactor and dbias of `dora_dropout_linear`, each where `needs` says so.

    z may be None where dfactor is not wanted.
    """
    need_x, need_A, need_B, need_factor, need_bias = needs
    last = (state, compute_dtype, backend)
    scaled, scale = _scaled(factor, dropout_p)
    wanted = (need_x or need_A or need_B, need_factor, False)
    product = dy if z is None else z
    dz, dfactor, _ = ops.dora_magnitude_bwd(dy, product, scaled, wanted, backend=backend)
    if dfactor is not None:
        dfactor = scale * dfactor
    dx = dA = dB = dbias = None
    if dz is not None:
        # `kept` is read for dA alone.
        kept = ops.dora_dropout_fwd(x, dropout_p, seed, backend=backend)[0] if need_A else x
        for_z = (need_x, need_A, need_B, False)
        lora = (lora_A, lora_B, S, None, scaling, 0.0)
        dx, dA, dB, _ = linear_bwd(dz, kept, weight, *lora, *last, for_z)
    if need_x or need_bias:
        for_rest = (need_x, False, False, need_bias)
        none = (*_no_adapter(lora_A, lora_B), S.new_zeros(S.shape[0], 1), None, 0.0, 0.0)
        drest, _, _, dbias = linear_bwd(dy, x, weight, *none, *last, for_rest)
        if dx is not None and drest is not None:
            dx = ops.dora_dropout_bwd(dx, drest, dropout_p, seed, backend=backend)
    return dx, dA, dB, dfactor, dbias


def _scaled(factor: Tensor, dropout_p: float) -> tuple[Tensor, float]:
    """The factor of what dropout keeps, `scale * factor`, and scale."""
    _, scale = dropout_threshold(dropout_p)
    return scale * factor, scale


def _no_adapter(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros of rank 1: the base product alone."""
    return lora_A.new_zeros(1, lora_A.shape[1]), lora_B.new_zeros(lora_B.shape[0], 1)


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


def dora_dropout_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    factor: Tensor,
    dropout_p: float,
    *,
    quant_state: QuantState | None = None,
    compute_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """DoRA on a linear layer, with dropout,

        y = factor * (x' W^T + scaling * x' A^T B^T) + (x - x') W^T + bias,   x' = drop(x)

    differentiable in x, bias, lora_A, lora_B and factor. The scale of x' goes into factor, since it
    would round x'.

    Args:
        x, weight, bias, lora_A, lora_B, scaling, quant_state, compute_dtype, seed: as in
            `lora_linear`; x and a dense weight have one dtype, or weight is cast to compute_dtype.
        factor: [N], fp32 (fp64 where x is): magnitude / norm of the rows of W + scaling * B A.
        dropout_p: probability of dropping an element of x, above 0.
        backend: "native", "triton" or "reference"; the device's best when None. The parts that have
            no kernel on it run on the reference.

    Returns:
        y [..., N] in x's dtype.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
        RuntimeError: the backend asked for can't run.
    """
    key = draw_seed(x, dropout_p, seed)
    assert key is not None
    tensors = (x.reshape(-1, x.shape[-1]), weight, bias, lora_A, lora_B, factor, key)
    options = (scaling, dropout_p, quant_state, compute_dtype, forced_backend(backend))
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, bias, lora_A, lora_B, factor)
    ):
        y = DoraDropoutLinearFunction.apply(*tensors, *options)
    else:
        y, _, _ = _dropout_linear(*tensors, *options)
    return y.view(*x.shape[:-1], y.shape[-1])
