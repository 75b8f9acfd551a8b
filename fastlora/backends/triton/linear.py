"""`lora_linear_fwd` and `lora_linear_bwd`: which kernels run, in which order."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layer import Grads, Layer, Needs
from ..machine.tuned import op_key
from ..schemas import packed
from .kernels.grad_a import grad_a
from .kernels.grad_b import grad_b
from .kernels.lora_term import Term
from .kernels.shrink import shrink
from .launch import Launcher
from .products import Product, dense_product, four_bit_product


def lora_linear_fwd(gpu: Launcher, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """`reference.lora_linear_fwd`: shrink, then the base product that begins with the LoRA term."""
    product = _product(gpu, "lora_linear_fwd", x, layer)
    S = tokens_times_A(gpu, x, layer.lora_A, layer.dropout_p, layer.seed)
    bias, B = layer.bias, layer.lora_B.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((len(x), len(B)))
    product(y, x, bias, Term(S, B.t(), layer.scaling))
    return y, S


def lora_linear_bwd(
    gpu: Launcher, dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs
) -> Grads:
    """`reference.lora_linear_bwd`: one pass over dy, dx with the masked term first, one over x."""
    product = _product(gpu, "lora_linear_bwd", x, layer)
    dS, grads = skinny_bwd(gpu, dy, x, layer, S, needs)
    if not needs.x:
        return grads
    dx, A = x.new_empty(x.shape), layer.lora_A.contiguous()
    product(dx, dy, None, Term(dS, A, 1.0).dropped(layer.dropout_p, layer.seed))
    return grads._replace(x=dx)


def _product(gpu: Launcher, op: str, x: Tensor, layer: Layer) -> Product:
    """The product with W of an op, dense or in 4 bits."""
    (N, R), K, state = layer.lora_B.shape, x.shape[1], layer.quant_state
    key, sizes, forward = op_key(op, state is not None), (len(x), N, K, R), op.endswith("fwd")
    base = layer.compute_dtype or x.dtype
    if state is None:
        right = layer.weight.t() if forward else layer.weight
        return dense_product(gpu, right, gpu.dense_tile(key, base, sizes))
    tiles = gpu.four_bit_tiles(key, base, sizes)
    return four_bit_product(gpu, packed(layer.weight, state), (N, K), forward, base, tiles)


def tokens_times_A(
    gpu: Launcher, x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """`reference.shrink`, of any rank."""
    if len(lora_A) == 0:
        return x.new_empty((len(x), 0), dtype=torch.float32)
    return shrink(gpu, x, lora_A.contiguous(), dropout_p, seed)


def skinny_bwd(
    gpu: Launcher, dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs
) -> tuple[Tensor, Grads]:
    """`reference.skinny_bwd`: one pass over dy, one over x.

    Args:
        needs: `x` and `A` need dS; unneeded, dS is S, for its shape.
    """
    A, B, S = layer.lora_A.contiguous(), layer.lora_B.contiguous(), S.contiguous()
    if len(x) == 0 or len(A) == 0:
        # No token, or no rank: every sum of the adapter is empty.
        dA = torch.zeros_like(A) if needs.A else None
        dB = torch.zeros_like(B) if needs.B else None
        return S, Grads(None, dA, dB, dy.sum(0, dtype=torch.float32) if needs.bias else None)
    asked = (needs.x or needs.A, needs.B, needs.bias)
    dS, dB, dbias = grad_b(gpu, dy, B, S, layer.scaling, asked)
    dA = None
    if needs.A:
        assert dS is not None
        dA = grad_a(gpu, x, dS, layer.dropout_p, layer.seed, A.dtype)
    return S if dS is None else dS, Grads(None, dA, dB, dbias)
