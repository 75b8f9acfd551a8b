"""The differentiable layer of DoRA: `dora_linear` and its autograd Function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..layer import Grads, Layer, Needs
from ..reference import dropout_threshold
from ..reference.precision import sum_dtype
from .common import (
    Saved,
    as_matrix,
    autocast_off,
    differentiable_gradients,
    prepared,
    run_backward,
    wants_gradient,
    working,
)

_DX_ALONE = Needs(True, False, False)


class _DoraGrads(NamedTuple):
    """The gradients of `dora_linear`; those of the layer in `own`."""

    own: Grads
    factor: Tensor | None


class DoraLinearFunction(torch.autograd.Function):
    """`dora_linear`, with gradients for x, bias, lora_A, lora_B and factor, each only where asked
    for.

    Saves x, S [M, R], the adapters, factor, the dropout's seed and, where factor is trained, the
    product [M, N] that it multiplies (with dropout in the adapter's dtype): no mask, no copy of x.
    A double backward runs in plain torch, and without dropout rounds that product's gradient to x's
    dtype on its way to the adapters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: Layer,
        backend: str | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        factor: Tensor,
    ) -> Tensor:
        y, z, S = _dora_linear(x, layer, factor, backend)
        product = z if ctx.needs_input_grad[6] else None
        ctx.saved = Saved(ctx, (x, factor, S, product), (layer,), backend)
        ctx.row_bias = bias is not None and bias.dim() == 1
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, factor, S, z), (layer,) = ctx.saved.restore(ctx)
        (need,), need_factor = ctx.saved.needs(ctx, 3), ctx.needs_input_grad[6]
        summed = need._replace(bias=need.bias and ctx.row_bias)

        def plain() -> _DoraGrads:
            dx, dA, dB, dfactor = differentiable_gradients(
                lambda x, A, B, factor: _dora_linear(
                    x, layer._replace(lora_A=A, lora_B=B, bias=None), factor, "reference"
                )[:1],
                (x, layer.lora_A, layer.lora_B, factor),
                (*need[:3], need_factor),
                (dy,),
            )
            dbias = dy.sum(0, dtype=sum_dtype(dy)) if summed.bias else None
            return _DoraGrads(Grads(dx, dA, dB, dbias), dfactor)

        own, dfactor = run_backward(
            dy.device,
            lambda: _dora_linear_bwd(
                dy, x, layer, factor, S, z, summed, need_factor, ctx.saved.backend
            ),
            plain,
        )
        if need.bias and not ctx.row_bias:
            own = own._replace(bias=dy)
        return own.x, None, None, *ctx.saved.gradients((own,)), dfactor


def _dora_linear(
    x: Tensor, layer: Layer, factor: Tensor, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y of `dora_linear`, the product z that factor multiplies, and S."""
    layer, bias, p = working(layer), layer.bias, layer.dropout_p
    kept, adapted = x, _undropped(layer)
    if p != 0.0:
        assert layer.seed is not None
        kept, rest = ops.dora_dropout_fwd(x, p, layer.seed, backend=backend)
        bias, _ = ops.lora_linear_fwd(rest, _base(layer), backend=backend)
        # As in PEFT's code z is in the adapter's dtype then: factor's gradient sums it. The
        # operands of the base product keep theirs.
        adapted = adapted._replace(compute_dtype=layer.compute_dtype or x.dtype)
        kept = kept.to(layer.lora_A.dtype)
    z, S = ops.lora_linear_fwd(kept, adapted, backend=backend)
    scaled, _ = _scaled(factor, p)
    y = ops.dora_magnitude_fwd(z, scaled, bias, backend=backend)
    return y.to(x.dtype), z, S


def _dora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    layer: Layer,
    factor: Tensor,
    S: Tensor,
    z: Tensor | None,
    need: Needs,
    need_factor: bool,
    backend: str | None,
) -> _DoraGrads:
    """The gradients of `dora_linear`, each where it is needed.

    z may be None where dfactor is not needed.
    """
    layer, p, seed = working(layer), layer.dropout_p, layer.seed
    plain = _undropped(layer)
    # An adapter wider than dz = factor * dy would lose bits to the rounding of dz: it takes dy, and
    # factor goes into B.
    wider = layer.lora_A.dtype != dy.dtype and (need.A or need.B)
    scaled, scale = _scaled(factor, p)
    wide_z = z is not None and z.dtype != dy.dtype
    wanted = (need.x or ((need.A or need.B) and not wider), need_factor and not wide_z, need.bias)
    product = dy if z is None or wide_z else z
    dz, dfactor, dbias = ops.dora_magnitude_bwd(dy, product, scaled, wanted, backend=backend)
    if z is not None and wide_z:
        alone = (False, True, False)
        _, dfactor, _ = ops.dora_magnitude_bwd(dy.to(z.dtype), z, scaled, alone, backend=backend)
    if dfactor is not None:
        dfactor = scale * dfactor
    kept = x
    if seed is not None and need.A:
        kept, _ = ops.dora_dropout_fwd(x, p, seed, backend=backend)
    dx = dA = dB = None
    if dz is not None:
        asked = Needs(need.x, need.A and not wider, need.B and not wider)
        dx, dA, dB, _ = ops.lora_linear_bwd(dz, kept, plain, S, asked, backend=backend)
    if wider:
        column = scaled[:, None]
        scaled_B = plain._replace(lora_B=(column * plain.lora_B).to(plain.lora_B.dtype))
        asked = Needs(False, need.A, need.B)
        _, dA, dB, _ = ops.lora_linear_bwd(dy, kept, scaled_B, S, asked, backend=backend)
        dB = None if dB is None else (column * dB).to(plain.lora_B.dtype)
    if seed is not None and dx is not None:
        none = S.new_zeros(S.shape[0], 1)
        base = _base(layer)._replace(bias=None)
        drest = ops.lora_linear_bwd(dy, x, base, none, _DX_ALONE, backend=backend).x
        assert drest is not None
        dx = ops.dora_dropout_bwd(dx, drest, p, seed, backend=backend)
    return _DoraGrads(Grads(dx, dA, dB, dbias), dfactor)


def _scaled(factor: Tensor, dropout_p: float) -> tuple[Tensor, float]:
    """The factor of the elements that dropout keeps, `scale * factor`, and scale."""
    if dropout_p == 0.0:
        return factor, 1.0
    _, scale = dropout_threshold(dropout_p)
    return scale * factor, scale


def _undropped(layer: Layer) -> Layer:
    """The layer without bias and dropout, for an x that has lost its elements already."""
    return layer._replace(bias=None, dropout_p=0.0, seed=None)


def _base(layer: Layer) -> Layer:
    """The layer's base product alone, with zeros of rank 1 as its adapter, and its bias."""
    A, B = layer.lora_A, layer.lora_B
    zeros = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
    return layer._replace(lora_A=zeros[0], lora_B=zeros[1], scaling=0.0, dropout_p=0.0, seed=None)


def dora_linear(x: Tensor, layer: Layer, factor: Tensor, *, backend: str | None = None) -> Tensor:
    """DoRA on a linear layer,

        y = factor * (x' W^T + scaling * x' A^T B^T) + (x - x') W^T + bias,   x' = drop(x)

    differentiable in x, bias, lora_A, lora_B and factor. The scale of x' goes into factor, since it
    would round x'.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        layer: see `Layer`; its bias is [N], y's shape (without dropout alone), or None.
        factor: [N], fp32 (fp64 where x is): magnitude / norm of the rows of W + scaling * B A.
        backend: "native", "triton" or "reference"; the device's best when None. What it has no
            kernel for, of DoRA's own parts, runs on the reference.

    Under autocast as `lora_linear`; factor keeps its dtype.

    Returns:
        y [..., N] in x's dtype (autocast's dtype under autocast).

    Raises:
        ValueError, TypeError: a shape or dtype does not fit; weight requires a gradient.
        RuntimeError: the backend asked for can't run the products.
    """
    x, (layer,), backend = prepared(x, (layer,), backend)
    rows, N, bias = as_matrix(x), layer.lora_B.shape[0], layer.bias
    if bias is not None and bias.shape != (N,):
        if layer.dropout_p != 0.0 or bias.shape != (*x.shape[:-1], N):
            raise ValueError(
                f"bias must be [{N}], or without dropout of y's shape, got {tuple(bias.shape)}"
            )
        bias = bias.reshape(len(rows), N)
        layer = layer._replace(bias=bias)
    A, B = layer.lora_A, layer.lora_B
    with autocast_off(x.device):
        if wants_gradient(x, bias, A, B, factor):
            y = DoraLinearFunction.apply(rows, layer, backend, bias, A, B, factor)
        else:
            y, _, _ = _dora_linear(rows, layer, factor, backend)
    return y.view(*x.shape[:-1], y.shape[-1])
