"""Shared by both base products: the order of tiles, and the LoRA term they begin with."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....reference import dropout_threshold
from .dropout import BLOCK, keep_tile
from .products import dot_adapter


class Term(NamedTuple):
    """The LoRA term `drop'(factor * P Q)` of a result [M, N].

    Args:
        P: fp32 [M, R], contiguous.
        Q: [R, N], any strides.
        factor: of the product.
        seed: int64 [1] on the device; None for no dropout.
        threshold, scale: of `reference.dropout_threshold`.
        first_block: block of 128 columns at which Q begins, for a panel of the result.
    """

    P: Tensor
    Q: Tensor
    factor: float
    seed: Tensor | None = None
    threshold: int = 0
    scale: float = 1.0
    first_block: int = 0

    def dropped(self, p: float, seed: Tensor | None) -> Term:
        """This term with dropout of probability p."""
        return Term(self.P, self.Q, self.factor, seed, *dropout_threshold(p)) if p > 0.0 else self

    def panel(self, begin: int, end: int) -> Term:
        """The term of the result's columns [begin, end), `begin` a multiple of 128."""
        return self._replace(Q=self.Q[:, begin:end], first_block=begin // BLOCK)


@triton.jit
def grouped(pid, rows, columns, GROUP: tl.constexpr):
    """Tile (row, column) of program pid: GROUP rows of tiles are walked column by column, so that
    the programs that run together share their operands in the L2 cache."""
    width = GROUP * columns
    first = pid // width * GROUP
    height = min(rows - first, GROUP)
    return first + pid % width % height, pid % width // height


@triton.jit
def lora_term(
    p,
    q,
    seed,
    rows,
    columns,
    row_ok,
    column_ok,
    block,
    R,
    factor,
    stride_qr,
    stride_qn,
    threshold,
    drop_scale,
    BR: tl.constexpr,
    CHUNKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BASE: tl.constexpr,
    SWAP: tl.constexpr,
):
    """`drop'(factor * P Q)` on one tile, fp32 [BM, BN]; P [M, R] fp32, Q [R, N] by its strides.

    With SWAP the tile is transposed, [BN, BM].
    """
    BM: tl.constexpr = rows.shape[0]
    BN: tl.constexpr = columns.shape[0]
    if SWAP:
        acc = tl.zeros([BN, BM], tl.float32)
    else:
        acc = tl.zeros([BM, BN], tl.float32)
    # One stage: a pipeline over ranks would take the shared memory of the main loop's.
    for chunk in tl.range(0, CHUNKS, num_stages=1):
        ranks = chunk * BR + tl.arange(0, BR)
        rank_ok = ranks < R
        P = tl.load(
            p + rows[:, None] * R + ranks[None, :],
            mask=row_ok[:, None] & rank_ok[None, :],
            other=0.0,
        )
        Q = tl.load(
            q + ranks.to(tl.int64)[:, None] * stride_qr + columns.to(tl.int64)[None, :] * stride_qn,
            mask=rank_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        acc = dot_adapter(P * factor, Q, acc, BASE, SWAP)
    if DROPOUT:
        keep = keep_tile(tl.load(seed), rows, block, threshold, BN)
        if SWAP:
            keep = tl.trans(keep)
        acc = tl.where(keep, acc * drop_scale, 0.0)
    return acc


# Ranks in one product of the LoRA term: with more, mma.sync's prologue spills.
RANKS = 16


def rank_chunks(R: int) -> tuple[int, int]:
    """Ranks in one product of the LoRA term, and how many such products there are."""
    return RANKS, triton.cdiv(R, RANKS)
