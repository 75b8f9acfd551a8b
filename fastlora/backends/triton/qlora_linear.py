"""`qlora_linear_fwd` and `qlora_linear_bwd`: a 4-bit base, decoded in the product or before it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernels.base_product_4bit import base_product_4bit, fits
from .kernels.dequantize_4bit import PANEL, Packed, dequantize_4bit
from .kernels.dropout import Dropout
from .launch import Launcher, Tile
from .lora_linear import Grads, Product, backward, dense_product, forward

# A decoded weight takes no more than this; a larger one is decoded panel by panel.
WORKSPACE_BYTES = 256 * 2**20


def panels(
    packed: Packed, shape: tuple[int, int], is_forward: bool, dtype: torch.dtype, limit: int
) -> list[tuple[int, int]]:
    """Ranges of the result's columns whose decoded weight takes at most `limit` bytes.

    Rows of W for the forward, in steps that end on a word and on a block; columns of W for dx, in
    steps of `PANEL`. Where rows are no whole blocks, dx decodes the weight as one.
    """
    columns, depth = shape if is_forward else shape[::-1]
    rows = packed.blocksize // math.gcd(shape[1], packed.blocksize)
    step = max(rows, 8) if is_forward else PANEL
    width = max(limit // (depth * dtype.itemsize) // step * step, step)
    if not is_forward and shape[1] % packed.blocksize:
        width = columns
    return [(begin, min(begin + width, columns)) for begin in range(0, columns, width)]


def decoded_panel(
    gpu: Launcher,
    packed: Packed,
    shape: tuple[int, int],
    is_forward: bool,
    panel: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Right operand of the panel's product: rows of W, transposed, or columns of W."""
    N, K = shape
    begin, end = panel
    if not is_forward:
        out = packed.data.new_empty((N, end - begin), dtype=dtype)
        whole = end - begin == K
        return dequantize_4bit(gpu, packed, out, shape, None if whole else panel)
    out = packed.data.new_empty((end - begin, K), dtype=dtype)
    return dequantize_4bit(gpu, packed, out, first_word=begin * K // 8).t()


def four_bit_product(
    gpu: Launcher,
    packed: Packed,
    shape: tuple[int, int],
    is_forward: bool,
    base: torch.dtype,
    tiles: tuple[Tile | None, Tile | None],
) -> Product:
    """`out = left W^T` (forward) or `left W`, `+ bias + drop'(factor * P Q)`.

    Args:
        base: dtype of the base product.
        tiles: of the kernel that decodes inside the product, None to decode before it; then of the
            dense product, None for the vendor's.
    """
    fused_tile, dense_tile = tiles

    def product(
        out: Tensor,
        left: Tensor,
        bias: Tensor | None,
        P: Tensor,
        Q: Tensor,
        factor: float,
        dropout: Dropout,
    ) -> None:
        if left.dtype.itemsize > base.itemsize:
            # fp32 tokens would need twice the shared memory that the tiles are made for.
            left = left.to(base)
        if fused_tile is not None and fits(packed, shape[1], base):
            base_product_4bit(
                gpu, out, left, packed, shape, is_forward, bias, P, Q, factor, dropout, base,
                fused_tile,
            )  # fmt: skip
            return
        tile = dense_tile
        if tile is None and base != out.dtype:
            # The vendor's product would be rounded to the base's dtype before the term is added.
            tile = gpu.table_tile("base_product", base, M=len(left), R=P.shape[1])
        for begin, end in panels(packed, shape, is_forward, base, WORKSPACE_BYTES):
            right = decoded_panel(gpu, packed, shape, is_forward, (begin, end), base)
            part = None if bias is None else bias[begin:end]
            columns = (out[:, begin:end], left, part, P, Q[:, begin:end])
            dense_product(gpu, right, tile)(*columns, factor, dropout.at(begin))

    return product


def qlora_linear_fwd(
    gpu: Launcher,
    x: Tensor,
    packed: Packed,
    base: torch.dtype,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`reference.qlora_linear_fwd`."""
    shape = (len(lora_B), x.shape[1])
    tiles = gpu.four_bit_tiles("qlora_linear_fwd", base, (len(x), *shape, len(lora_A)))
    product = four_bit_product(gpu, packed, shape, True, base, tiles)
    return forward(gpu, product, x, bias, lora_A, lora_B, scaling, dropout_p, seed)


def qlora_linear_bwd(
    gpu: Launcher,
    dy: Tensor,
    x: Tensor,
    packed: Packed,
    base: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> Grads:
    """`reference.qlora_linear_bwd`."""
    shape = (len(lora_B), x.shape[1])
    tiles = gpu.four_bit_tiles("qlora_linear_bwd", base, (len(x), *shape, len(lora_A)))
    product = four_bit_product(gpu, packed, shape, False, base, tiles)
    return backward(gpu, product, dy, x, lora_A, lora_B, S, scaling, dropout_p, seed, needs)
