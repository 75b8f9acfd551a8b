"""The base product on a 4-bit weight, decoded tile by tile inside the product.

    y  = x W^T + bias + scaling * S B^T         W's rows are y's columns
    dx = dy W + drop'(dS A)                     W's rows are summed over

The packed bytes are bitsandbytes' own, read as words of eight codes. Rows must be whole blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...schemas import Packed
from ..launch import Launcher
from ..tiles import Tile
from .decode4 import block_scale, decode, load_code
from .lora_term import Term, grouped, lora_term, rank_chunks
from .products import dot_either, rounded


@triton.jit
def weight_tile(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    values,
    row,
    column,
    N,
    row_words,
    row_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    PERMUTE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """`W[row : row + ROWS, column : column + COLUMNS]` in DTYPE; zero outside of [N, K].

    The scale has an axis of its own, so that a block's products are formed once for its words.
    row_words and row_blocks are a row's words of eight codes and its blocks. WHOLE: no part of any
    tile lies outside.
    """
    blocks: tl.constexpr = max(COLUMNS // BLOCKSIZE, 1)
    per_block: tl.constexpr = COLUMNS // 8 // blocks
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    block = tl.arange(0, blocks)[None, :, None]
    # Told that its tiles are aligned, the compiler reads several words at once.
    first = tl.multiple_of(column // 8, COLUMNS // 8)
    words = first + block * per_block + tl.arange(0, per_block)[None, None, :]
    in_row = column // BLOCKSIZE + block
    if WHOLE:
        nibbles = tl.load(packed + rows * row_words + words)
    else:
        word_ok = (rows < N) & (words < row_words)
        nibbles = tl.load(packed + rows * row_words + words, mask=word_ok, other=0)
    scale = block_scale(
        absmax,
        nested_absmax,
        nested_code,
        offset,
        rows * row_blocks + in_row,
        (rows < N) & (in_row < row_blocks),
        NESTED_BLOCKSIZE,
        WHOLE,
        True,
    )
    weight = decode(nibbles, scale, code, values, DTYPE, PERMUTE)
    return weight.reshape([ROWS, COLUMNS])


@triton.jit(do_not_specialize=["M", "threshold", "first_block"])
def base_product_4bit_kernel(
    left,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    bias,
    p,
    q,
    seed,
    out,
    M,
    N,
    K,
    R,
    row_words,
    row_blocks,
    factor,
    threshold,
    drop_scale,
    first_block,
    stride_lm,
    stride_lc,
    stride_qr,
    stride_qn,
    stride_om,
    FORWARD: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SWAP: tl.constexpr,
    PERMUTE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BR: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    if FORWARD:
        width, depth = N, K
    else:
        width, depth = K, N
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(width, BN), GROUP)
    rows = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    row_ok, column_ok = rows < M, columns < width
    acc = lora_term(
        p, q, seed, rows, columns, row_ok, column_ok, first_block + tile_n * (BN // 128), R, factor,
        stride_qr, stride_qn, threshold, drop_scale, BR, CHUNKS, DROPOUT, DTYPE,
        SWAP,
    )  # fmt: skip
    values = load_code(code, PERMUTE)
    inner = tl.arange(0, BK)
    # Rows past the end read row 0 and are not stored: the loop then needs no mask for them.
    left_at = (
        left
        + tl.where(row_ok, rows, 0)[:, None] * stride_lm
        + inner.to(tl.int64)[None, :] * stride_lc
    )
    # A step may be more than 2^31 elements.
    left_step = tl.full([], BK, tl.int64) * stride_lc
    for start in range(0, depth, BK):
        if WHOLE:
            a = tl.load(left_at)
        else:
            a = tl.load(left_at, mask=(inner < depth - start)[None, :], other=0.0)
        if FORWARD:
            b = tl.trans(
                weight_tile(
                    packed, absmax, nested_absmax, nested_code, offset, code, values,
                    tile_n * BN, start, N, row_words, row_blocks, BN, BK, BLOCKSIZE,
                    NESTED_BLOCKSIZE, DTYPE, PERMUTE, WHOLE,
                )
            )  # fmt: skip
        else:
            b = weight_tile(
                packed, absmax, nested_absmax, nested_code, offset, code, values,
                start, tile_n * BN, N, row_words, row_blocks, BK, BN, BLOCKSIZE,
                NESTED_BLOCKSIZE, DTYPE, PERMUTE, WHOLE,
            )  # fmt: skip
        acc = dot_either(rounded(a, DTYPE), b, acc, SWAP)
        left_at += left_step
    if BIAS:
        added = tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)
        if SWAP:
            acc += added[:, None]
        else:
            acc += added[None, :]
    result = rounded(acc, out.dtype.element_ty)
    if SWAP:
        at = columns[:, None] + rows[None, :] * stride_om
        tl.store(out + at, result, mask=column_ok[:, None] & row_ok[None, :])
    else:
        at = rows[:, None] * stride_om + columns[None, :]
        tl.store(out + at, result, mask=row_ok[:, None] & column_ok[None, :])


def fits(packed: Packed, K: int, dtype: torch.dtype) -> bool:
    """True when the kernel can read this weight: rows of whole blocks, words of codes, pairs of
    nested absmax, and a 16-bit product."""
    readable = packed.in_words and (packed.nested_blocksize == 0 or packed.absmax_in_pairs)
    return readable and K % packed.blocksize == 0 and dtype != torch.float32


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def base_product_4bit(
    gpu: Launcher,
    out: Tensor,
    left: Tensor,
    packed: Packed,
    shape: tuple[int, int],
    forward: bool,
    bias: Tensor | None,
    term: Term,
    dtype: torch.dtype,
    tile: Tile,
) -> None:
    """`out = left W^T` (forward) or `left W`, `+ bias + term`, rounded once.

    Args:
        out: [M, N] or [M, K], rows of any stride, columns next to each other; written.
        left: [M, K] or [M, N], any strides; rounded to the product's dtype.
        packed, shape: the weight, (N, K), for which `fits` holds.
        bias: of out's columns, or None.
        dtype: of the base product, bf16 or fp16.
    """
    M, (N, K), R = left.shape[0], shape, term.P.shape[1]
    columns, depth = (N, K) if forward else (K, N)
    width, chunks = rank_chunks(R)
    gpu.run(
        base_product_4bit_kernel,
        (triton.cdiv(M, tile.BM) * triton.cdiv(columns, tile.BN),),
        left,
        packed.data.view(torch.int32),
        packed.absmax.view(torch.int16) if packed.nested_blocksize else packed.absmax,
        packed.nested_absmax,
        packed.nested_code,
        packed.nested_offset,
        packed.code,
        bias,
        term.P,
        term.Q,
        term.seed,
        out,
        M,
        N,
        K,
        R,
        K // 8,
        K // packed.blocksize,
        term.factor,
        term.threshold,
        term.scale,
        term.first_block,
        left.stride(0),
        left.stride(1),
        term.Q.stride(0),
        term.Q.stride(1),
        out.stride(0),
        FORWARD=forward,
        WHOLE=columns % tile.BN == 0 and depth % tile.BK == 0,
        BIAS=bias is not None,
        DROPOUT=term.seed is not None,
        SWAP=forward and gpu.limits.weight_left,
        PERMUTE=gpu.words,
        DTYPE=_DTYPES[dtype],
        BLOCKSIZE=packed.blocksize,
        NESTED_BLOCKSIZE=packed.nested_blocksize,
        BR=width,
        CHUNKS=chunks,
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        GROUP=tile.group,
        tile=tile,
    )
