"""`lora_linear_fwd` and `lora_linear_bwd` for a dense base: which kernels run, in which order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .kernels.base_product import base_product
from .kernels.dropout import Dropout
from .kernels.grad_a import grad_a
from .kernels.grad_b import grad_b
from .kernels.shrink import shrink
from .launch import Launcher, Tile

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# The base product with its LoRA term: out, left, bias, P, Q, factor, dropout. It fills out.
Product = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float, Dropout], None]


def dense_product(gpu: Launcher, right: Tensor, tile: Tile | None) -> Product:
    """`out = left right + bias + drop'(factor * P Q)` on a dense [C, N] `right`.

    Args:
        tile: of the kernel that holds the term in its accumulator; None for the vendor's product,
            which adds to a term that a kernel has written (rounded to out's dtype).
    """

    def product(
        out: Tensor,
        left: Tensor,
        bias: Tensor | None,
        P: Tensor,
        Q: Tensor,
        factor: float,
        dropout: Dropout,
    ) -> None:
        if tile is not None:
            base_product(gpu, out, left, right, bias, P, Q, factor, dropout, tile)
            return
        term = gpu.table_tile("base_product", out.dtype, M=len(left), R=P.shape[1])
        base_product(gpu, out, left[:, :0], right[:0], bias, P, Q, factor, dropout, term)
        out.addmm_(left, right)

    return product


def lora_linear_fwd(
    gpu: Launcher,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`reference.lora_linear_fwd`: shrink, then the base product that begins with the LoRA term."""
    sizes = (len(x), weight.shape[0], weight.shape[1], len(lora_A))
    tile = gpu.dense_tile("lora_linear_fwd", x.dtype, sizes)
    product = dense_product(gpu, weight.t(), tile)
    return forward(gpu, product, x, bias, lora_A, lora_B, scaling, dropout_p, seed)


def lora_linear_bwd(
    gpu: Launcher,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> Grads:
    """`reference.lora_linear_bwd`: one pass over dy, dx with the masked term first, one over x."""
    sizes = (len(x), weight.shape[0], weight.shape[1], len(lora_A))
    tile = gpu.dense_tile("lora_linear_bwd", x.dtype, sizes)
    product = dense_product(gpu, weight, tile)
    return backward(gpu, product, dy, x, lora_A, lora_B, S, scaling, dropout_p, seed, needs)


def forward(
    gpu: Launcher,
    product: Product,
    x: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and S, whatever the base is stored in."""
    bias = None if bias is None else bias.contiguous()
    S = tokens_times_A(gpu, x, lora_A, dropout_p, seed)
    lora_B = lora_B.contiguous()
    y = x.new_empty((len(x), len(lora_B)))
    product(y, x, bias, S, lora_B.t(), scaling, Dropout())
    return y, S


def backward(
    gpu: Launcher,
    product: Product,
    dy: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> Grads:
    """(dx, dA, dB, dbias), whatever the base is stored in."""
    asked = (needs[0] or needs[1], *needs[1:])
    dS, dA, dB, dbias = skinny_bwd(gpu, dy, x, lora_A, lora_B, S, scaling, dropout_p, seed, asked)
    dx = None
    if needs[0]:
        dx = x.new_empty(x.shape)
        product(dx, dy, None, dS, lora_A.contiguous(), 1.0, Dropout.of(dropout_p, seed))
    return dx, dA, dB, dbias


def tokens_times_A(
    gpu: Launcher, x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """`reference.shrink`, of any rank."""
    if len(lora_A) == 0:
        return x.new_empty((len(x), 0), dtype=torch.float32)
    return shrink(gpu, x, lora_A.contiguous()[None], dropout_p, seed)[0]


def skinny_bwd(
    gpu: Launcher,
    dy: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`reference.skinny_bwd`: one pass over dy, one over x.

    Args:
        needs: dS, dA (which needs dS), dB, dbias. Unasked, dS is S, for its shape.
    """
    lora_A, lora_B, S = lora_A.contiguous(), lora_B.contiguous(), S.contiguous()
    need_dS, need_dA, need_dB, need_dbias = needs
    if len(x) == 0 or len(lora_A) == 0:
        # No token, or no rank: every sum of the adapter is empty.
        dA = torch.zeros_like(lora_A) if need_dA else None
        dB = torch.zeros_like(lora_B) if need_dB else None
        return S, dA, dB, dy.sum(0, dtype=torch.float32) if need_dbias else None
    dS, dB, dbias = grad_b(gpu, dy, lora_B, S, scaling, (need_dS, need_dB, need_dbias))
    dA = None
    if need_dA:
        assert dS is not None
        dA = grad_a(gpu, x, dS, dropout_p, seed, lora_A.dtype)
    return S if dS is None else dS, dA, dB, dbias
