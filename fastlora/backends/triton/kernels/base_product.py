"""The dense base product with the LoRA term as the first value of its accumulator.

    y  = x W^T + bias + scaling * S B^T          left = x,  right = W^T, P = S,  Q = B^T
    dx = dy W + drop'(dS A)                      left = dy, right = W,   P = dS, Q = A

The term goes first because dropout's mask must touch it alone: the accumulator then holds nothing
else. The main loop is that of a plain matrix product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launcher
from ..tiles import Tile
from .lora_term import Term, grouped, lora_term, rank_chunks
from .products import dot, rounded


@triton.jit(do_not_specialize=["M", "threshold", "first_block"])
def base_product_kernel(
    left,
    right,
    bias,
    p,
    q,
    seed,
    out,
    M,
    N,
    C,
    R,
    factor,
    threshold,
    drop_scale,
    first_block,
    stride_lm,
    stride_lc,
    stride_rc,
    stride_rn,
    stride_qr,
    stride_qn,
    stride_om,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    WHOLE: tl.constexpr,
    BR: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    rows = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    row_ok, column_ok = rows < M, columns < N
    acc = lora_term(
        p, q, seed, rows, columns, row_ok, column_ok, first_block + tile_n * (BN // 128), R, factor,
        stride_qr, stride_qn, threshold, drop_scale, BR, CHUNKS, DROPOUT, right.dtype.element_ty,
        False,
    )  # fmt: skip
    inner = tl.arange(0, BK)
    # Rows past the end read row 0 and are not stored: the loop then needs no mask for them.
    left_at = (
        left
        + tl.where(row_ok, rows, 0)[:, None] * stride_lm
        + inner.to(tl.int64)[None, :] * stride_lc
    )
    right_at = right + inner.to(tl.int64)[:, None] * stride_rc
    right_at += columns.to(tl.int64)[None, :] * stride_rn
    # A step may be more than 2^31 elements.
    block = tl.full([], BK, tl.int64)
    left_step, right_step = block * stride_lc, block * stride_rc
    for start in range(0, C, BK):
        if WHOLE:
            a = tl.load(left_at)
            b = tl.load(right_at)
        else:
            inner_ok = inner < C - start
            a = tl.load(left_at, mask=inner_ok[None, :], other=0.0)
            b = tl.load(right_at, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
        acc = dot(rounded(a, b.dtype), b, acc)
        left_at += left_step
        right_at += right_step
    if BIAS:
        acc += tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + rows[:, None] * stride_om + columns[None, :],
        rounded(acc, out.dtype.element_ty),
        mask=row_ok[:, None] & column_ok[None, :],
    )


def base_product(
    gpu: Launcher,
    out: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    term: Term,
    tile: Tile,
) -> None:
    """`out = left right + bias + term`, summed in fp32, rounded once.

    Args:
        out: [M, N], rows of any stride, columns next to each other; written.
        left: [M, C], any strides; rounded to right's dtype.
        right: [C, N], any strides. With C = 0 the result is the LoRA term and the bias alone.
        bias: [N] or None.
    """
    (M, C), N, R = left.shape, right.shape[1], term.P.shape[1]
    width, chunks = rank_chunks(R)
    gpu.run(
        base_product_kernel,
        (triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),),
        left,
        right,
        bias,
        term.P,
        term.Q,
        term.seed,
        out,
        M,
        N,
        C,
        R,
        term.factor,
        term.threshold,
        term.scale,
        term.first_block,
        left.stride(0),
        left.stride(1),
        right.stride(0),
        right.stride(1),
        term.Q.stride(0),
        term.Q.stride(1),
        out.stride(0),
        BIAS=bias is not None,
        DROPOUT=term.seed is not None,
        WHOLE=C % tile.BK == 0 and N % tile.BN == 0,
        BR=width,
        CHUNKS=chunks,
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        GROUP=tile.group,
        tile=tile,
    )
