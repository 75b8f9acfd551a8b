"""The differentiable layer of DoRA: `dora_linear` and its autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import forced_backend
from ..quant import QuantState, as_quant_state
from ..reference import dropout_threshold
from ..reference.precision import sum_dtype
from .linear import (
    autocast_off,
    check_frozen,
    differentiable_gradients,
    draw_seed,
    linear_bwd,
    linear_fwd,
    wants_gradient,
)


class DoraLinearFunction(torch.autograd.Function):
    """`dora_linear`, with gradients for x, bias, lora_A, lora_B and factor, each only where asked
    for.

    Saves x, S [M, R], the adapters, factor, the dropout's seed and, where factor is trained, the
    product [M, N] that it multiplies: no mask, no copy of x. A backward that is differentiated
    itself (`create_graph=True`) runs in plain torch, and rounds that product's gradient to x's
    dtype on its way to the adapters.
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
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        quant_state: QuantState | None,
        compute_dtype: torch.dtype | None,
        backend: str | None,
    ) -> Tensor:
        options = (scaling, dropout_p, quant_state, compute_dtype, backend)
        y, z, S = _dora_linear(x, weight, bias, lora_A, lora_B, factor, seed, *options)
        product = z if ctx.needs_input_grad[5] else None
        stats = () if quant_state is None else quant_state.tensors()
        ctx.save_for_backward(x, weight, lora_A, lora_B, factor, seed, S, product, *stats)
        ctx.state = None if quant_state is None else quant_state.without_tensors()
        ctx.options = (scaling, dropout_p, compute_dtype, backend)
        ctx.bias = None if bias is None else (bias.dim(), bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, factor, seed, S, z, *stats = ctx.saved_tensors
        scaling, dropout_p, compute_dtype, backend = ctx.options
        need_x, _, need_bias, need_A, need_B, need_factor = ctx.needs_input_grad[:6]
        state = None if ctx.state is None else ctx.state.with_tensors(*stats)
        summed = need_bias and ctx.bias[0] == 1
        needs = need_x, need_A, need_B, need_factor, summed
        dbias: Tensor | None
        with autocast_off(dy.device):
            if torch.is_grad_enabled():
                options = (scaling, dropout_p, state, compute_dtype, "reference")
                dx, dA, dB, dfactor = differentiable_gradients(
                    lambda x, A, B, f: _dora_linear(x, weight, None, A, B, f, seed, *options)[:1],
                    (x, lora_A, lora_B, factor),
                    needs[:4],
                    (dy,),
                )
                dbias = dy.sum(0, dtype=sum_dtype(dy)) if summed else None
            else:
                saved = (x, weight, lora_A, lora_B, factor, seed, S, z)
                options = (scaling, dropout_p, state, compute_dtype, backend)
                dx, dA, dB, dfactor, dbias = _dora_linear_bwd(dy, *saved, *options, needs)
        if need_bias:
            dbias = (dy if dbias is None else dbias).to(ctx.bias[1])
        return dx, None, dbias, dA, dB, dfactor, None, None, None, None, None, None


def _dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    factor: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    state: QuantState | None,
    compute_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y of `dora_linear`, the product z that factor multiplies, and S."""
    last = (state, compute_dtype, backend)
    kept = x
    if seed is not None:
        kept, rest = ops.dora_dropout_fwd(x, dropout_p, seed, backend=backend)
        no_A, no_B = _no_adapter(lora_A, lora_B)
        bias, _ = linear_fwd(rest, weight, bias, no_A, no_B, None, 0.0, 0.0, *last)
    z, S = linear_fwd(kept, weight, None, lora_A, lora_B, None, scaling, 0.0, *last)
    scaled, _ = _scaled(factor, dropout_p)
    return ops.dora_magnitude_fwd(z, scaled, bias, backend=backend), z, S


def _dora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    factor: Tensor,
    seed: Tensor | None,
    S: Tensor,
    z: Tensor | None,
    scaling: float,
    dropout_p: float,
    state: QuantState | None,
    compute_dtype: torch.dtype | None,
    backend: str | None,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """dx, dA, dB, dfactor and dbias of `dora_linear`, each where `needs` says so.

    z may be None where dfactor is not wanted.
    """
    need_x, need_A, need_B, need_factor, need_bias = needs
    # An adapter wider than dz = factor * dy would lose bits to the rounding of dz: it takes dy, and
    # factor goes into B.
    wider = lora_A.dtype != dy.dtype and (need_A or need_B)
    scaled, scale = _scaled(factor, dropout_p)
    wanted = (need_x or ((need_A or need_B) and not wider), need_factor, need_bias)
    product = dy if z is None else z
    dz, dfactor, dbias = ops.dora_magnitude_bwd(dy, product, scaled, wanted, backend=backend)
    if dfactor is not None:
        dfactor = scale * dfactor
    last = (state, compute_dtype, backend)
    kept = x
    if seed is not None and need_A:
        kept, _ = ops.dora_dropout_fwd(x, dropout_p, seed, backend=backend)
    dx = dA = dB = None
    if dz is not None:
        with_dz = (need_x, need_A and not wider, need_B and not wider, False)
        lora = (lora_A, lora_B, S, None, scaling, 0.0)
        dx, dA, dB, _ = linear_bwd(dz, kept, weight, *lora, *last, with_dz)
    if wider:
        column = scaled[:, None]
        lora = (lora_A, (column * lora_B).to(lora_B.dtype), S, None, scaling, 0.0)
        with_dy = (False, need_A, need_B, False)
        _, dA, dB, _ = linear_bwd(dy, kept, weight, *lora, *last, with_dy)
        dB = None if dB is None else (column * dB).to(lora_B.dtype)
    if seed is not None and dx is not None:
        none = (*_no_adapter(lora_A, lora_B), S.new_zeros(S.shape[0], 1), None, 0.0, 0.0)
        drest, *_ = linear_bwd(dy, x, weight, *none, *last, (True, False, False, False))
        assert drest is not None
        dx = ops.dora_dropout_bwd(dx, drest, dropout_p, seed, backend=backend)
    return dx, dA, dB, dfactor, dbias


def _scaled(factor: Tensor, dropout_p: float) -> tuple[Tensor, float]:
    """The factor of what dropout keeps, `scale * factor`, and scale."""
    if dropout_p == 0.0:
        return factor, 1.0
    _, scale = dropout_threshold(dropout_p)
    return scale * factor, scale


def _no_adapter(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros of rank 1: the base product alone."""
    return lora_A.new_zeros(1, lora_A.shape[1]), lora_B.new_zeros(lora_B.shape[0], 1)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    factor: Tensor,
    *,
    dropout_p: float = 0.0,
    quant_state: Any = None,
    compute_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """DoRA on a linear layer,

        y = factor * (x' W^T + scaling * x' A^T B^T) + (x - x') W^T + bias,   x' = drop(x)

    differentiable in x, bias, lora_A, lora_B and factor. The scale of x' goes into factor, since it
    would round x'.

    Args:
        x, weight, lora_A, lora_B, scaling, quant_state, compute_dtype, seed: as in `lora_linear`; x
            and a dense weight have one dtype, or weight is cast to compute_dtype. An autocast
            region around the call changes none of them.
        bias: [N], y's shape (without dropout alone), or None.
        factor: [N], fp32 (fp64 where x is): magnitude / norm of the rows of W + scaling * B A.
        dropout_p: probability of dropping an element of x.
        backend: "native", "triton" or "reference"; the device's best when None. What it has no
            kernel for, of DoRA's own parts, runs on the reference.

    Returns:
        y [..., N] in x's dtype.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit; weight requires a gradient.
        RuntimeError: the backend asked for can't run the products.
    """
    check_frozen(weight)
    rows, N = x.shape[:-1].numel(), lora_B.shape[0]
    if bias is not None and bias.shape != (N,):
        if dropout_p != 0.0 or bias.shape != (*x.shape[:-1], N):
            raise ValueError(
                f"bias must be [{N}], or without dropout of y's shape, got {tuple(bias.shape)}"
            )
        bias = bias.reshape(rows, N)
    seed = draw_seed(x, dropout_p, seed)
    state = None if quant_state is None else as_quant_state(quant_state)
    tensors = (x.reshape(rows, x.shape[-1]), weight, bias, lora_A, lora_B, factor, seed)
    options = (scaling, dropout_p, state, compute_dtype, forced_backend(backend))
    with autocast_off(x.device):
        if wants_gradient(x, bias, lora_A, lora_B, factor):
            y = DoraLinearFunction.apply(*tensors, *options)
        else:
            y, _, _ = _dora_linear(*tensors, *options)
    return y.view(*x.shape[:-1], y.shape[-1])
