"""The base product with its LoRA term: of a dense weight, or of one decoded in it or before it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..schemas import Packed
from .kernels.base_product import base_product
from .kernels.base_product_4bit import base_product_4bit, fits
from .kernels.dequantize_4bit import PANEL, dequantize_4bit
from .kernels.lora_term import Term
from .launch import Launcher
from .tiles import Tile

# `out = left W + bias + term`, its arguments in this order; it fills out.
Product = Callable[[Tensor, Tensor, Tensor | None, Term], None]
# A decoded weight takes at most this much; a larger one is decoded panel by panel.
WORKSPACE_BYTES = 256 * 2**20


def dense_product(gpu: Launcher, right: Tensor, tile: Tile | None) -> Product:
    """`out = left right + bias + term` on a dense [C, N] `right`.

    Args:
        tile: of the kernel that holds the term in its accumulator; None for the vendor's product,
            which adds to a term that a kernel has written (rounded to out's dtype), if right has
            out's dtype.
    """

    def product(out: Tensor, left: Tensor, bias: Tensor | None, term: Term) -> None:
        left, own, sizes = _narrowed(left, right.dtype), tile, {"M": len(left), "R": len(term.Q)}
        if own is None and right.dtype != out.dtype:
            # The vendor's product would be rounded to right's dtype before the term is added.
            own = gpu.table_tile("base_product", right.dtype, **sizes)
        if own is not None:
            base_product(gpu, out, left, right, bias, term, own)
            return
        own = gpu.table_tile("base_product", out.dtype, **sizes)
        base_product(gpu, out, left[:, :0], right[:0], bias, term, own)
        out.addmm_(left, right)

    return product


def _narrowed(left: Tensor, dtype: torch.dtype) -> Tensor:
    """left in no more than dtype: fp32 tokens need twice the shared memory that tiles are for."""
    return left.to(dtype) if left.dtype.itemsize > dtype.itemsize else left


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
    """`out = left W^T` (forward) or `left W`, `+ bias + term`.

    Args:
        base: dtype of the base product.
        tiles: of the kernel that decodes inside the product, None to decode before it; then of the
            dense product, None for the vendor's.
    """
    fused_tile, dense_tile = tiles

    def product(out: Tensor, left: Tensor, bias: Tensor | None, term: Term) -> None:
        if fused_tile is not None and fits(packed, shape[1], base):
            left = _narrowed(left, base)
            base_product_4bit(
                gpu, out, left, packed, shape, is_forward, bias, term, base, fused_tile
            )
            return
        for begin, end in panels(packed, shape, is_forward, base, WORKSPACE_BYTES):
            right = decoded_panel(gpu, packed, shape, is_forward, (begin, end), base)
            part = None if bias is None else bias[begin:end]
            dense_product(gpu, right, dense_tile)(
                out[:, begin:end], left, part, term.panel(begin, end)
            )

    return product
