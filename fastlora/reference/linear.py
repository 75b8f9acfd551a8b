"""LoRA on a linear layer, dense or in 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layer import Grads, Layer, Needs
from .dropout import drop
from .precision import sum_dtype
from .quantize import dequantize_4bit


def lora_linear_fwd(x: Tensor, layer: Layer, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """`S = drop(x) A^T`, `y = x W^T + bias + scaling * S B^T`.

    Args:
        x: [M, K], fp32, bf16 or fp16 (fp64 for checks).
        layer: see `Layer`; W [N, K] is its weight, decoded if it is in 4 bits. If W has
            another dtype than x, x is rounded to that one for the base product alone.
        first_row: m of x's first row in the dropout's mask, if x is a part of a larger batch.

    Returns:
        y [M, N] in x's dtype; S [M, R] in fp32 (fp64 for fp64), unscaled, saved for the backward.
    """
    acc = sum_dtype(x)
    W = dense_weight(layer, x.dtype)
    S = shrink(x, layer, first_row)
    term = layer.scaling * (S @ layer.lora_B.to(acc).T)
    y = x.to(W.dtype).to(acc) @ W.to(acc).T + term
    if layer.bias is not None:
        y = y + layer.bias.to(acc)
    return y.to(x.dtype), S


def lora_linear_bwd(
    dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs, first_row: int = 0
) -> Grads:
    """Gradients of `lora_linear_fwd`, for `dy = dL/dy`:

        dS = scaling * dy B            dx    = dy W + drop'(dS A)
        dA = dS^T drop(x)              dB    = scaling * dy^T S
                                       dbias = sum over m of dy

    Args:
        dy: [M, N], x's dtype.
        x, layer, first_row: as given to the forward.
        S: [M, R], as returned by the forward.
        needs: which gradients to compute.

    Returns:
        dx [M, K] in x's dtype, dA [R, K] and dB [N, R] in the adapter's dtype, dbias [N] in fp32
        (fp64 for fp64).
    """
    dS, grads = skinny_bwd(dy, x, layer, S, needs, first_row)
    if not needs.x:
        return grads
    return grads._replace(x=wide_dx(dy, dS, layer, first_row).to(dy.dtype))


def dense_weight(layer: Layer, dtype: torch.dtype) -> Tensor:
    """The layer's W, decoded to `compute_dtype or dtype` if it is in 4 bits."""
    if layer.quant_state is None:
        return layer.weight
    return dequantize_4bit(layer.weight, layer.quant_state, layer.compute_dtype or dtype)


def shrink(x: Tensor, layer: Layer, first_row: int = 0) -> Tensor:
    """`S = drop(x) A^T`, `[M, R]` in fp32 (fp64 for fp64); arguments as in `lora_linear_fwd`."""
    acc = sum_dtype(x)
    return drop(x.to(acc), layer.dropout_p, layer.seed, first_row) @ layer.lora_A.to(acc).T


def wide_dx(dy: Tensor, dS: Tensor, layer: Layer, first_row: int = 0) -> Tensor:
    """`dy W + drop'(dS A)`, `[M, K]` in dS's dtype: dx of `lora_linear_bwd` before it is rounded.

    Arguments as in `lora_linear_bwd`; dS as returned by `skinny_bwd`.
    """
    W = dense_weight(layer, dy.dtype)
    return dy.to(W.dtype).to(dS.dtype) @ W.to(dS.dtype) + expand_dx(dS, layer, first_row)


def skinny_bwd(
    dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs, first_row: int = 0
) -> tuple[Tensor, Grads]:
    """The part of `lora_linear_bwd` without W: `dS`, `[M, R]` in fp32, and dA, dB, dbias.

    Arguments as in `lora_linear_bwd`; `needs.x` is not looked at.
    """
    acc = sum_dtype(dy)
    g = dy.to(acc)
    dS = layer.scaling * (g @ layer.lora_B.to(acc))
    dA = dB = dbias = None
    if needs.A:
        kept = drop(x.to(acc), layer.dropout_p, layer.seed, first_row)
        dA = (dS.T @ kept).to(layer.lora_A.dtype)
    if needs.B:
        dB = (layer.scaling * (g.T @ S)).to(layer.lora_B.dtype)
    if needs.bias:
        dbias = g.sum(0)
    return dS, Grads(None, dA, dB, dbias)


def expand_dx(dS: Tensor, layer: Layer, first_row: int = 0) -> Tensor:
    """`drop'(dS A)`, `[M, K]` in dS's dtype: the LoRA term of dx."""
    return drop(dS @ layer.lora_A.to(dS.dtype), layer.dropout_p, layer.seed, first_row)


def merge_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`W + scaling * B A`, not yet rounded to W's dtype.

    Args:
        weight: [N, K], dense.
        lora_A: [R, K].
        lora_B: [N, R].
        scaling: factor of the LoRA term.

    Returns:
        [N, K] in fp32 (fp64 for fp64).
    """
    acc = sum_dtype(weight)
    return weight.to(acc) + scaling * (lora_B.to(acc) @ lora_A.to(acc))
