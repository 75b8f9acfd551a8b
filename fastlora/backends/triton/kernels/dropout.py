"""The dropout mask of a tile, computed where it is used and defined in `reference.dropout_mask`."""

from __future__ import annotations

import triton
import triton.language as tl

from ....reference import PHILOX_ROUNDS

# One Philox block covers this many neighbouring columns; tiles begin at a multiple of it.
BLOCK = 128
_BLOCK = tl.constexpr(BLOCK)
_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def keep_tile(seed, rows, block, threshold, WIDTH: tl.constexpr):
    """`mask[m, k]` of `reference.dropout_mask` for one tile, int1 [rows, WIDTH].

    16 counters a block give four words each: 128 columns. Word w of lane l holds columns
    `32 w + 2 l` (its low half) and `32 w + 2 l + 1`.

    Args:
        seed: int64 scalar.
        rows: int64 [BM], the tokens.
        block: first column / 128.
        threshold: int32, of `reference.dropout_threshold`.
        WIDTH: columns, a multiple of 128.
    """
    tl.static_assert(WIDTH % 128 == 0, "the mask comes in blocks of 128 columns")
    BM: tl.constexpr = rows.shape[0]
    BLOCKS: tl.constexpr = WIDTH // _BLOCK
    zero = tl.zeros([BM, BLOCKS, 16], tl.uint32)
    lane = zero + tl.arange(0, 16).to(tl.uint32)[None, None, :]
    column = zero + (block + tl.arange(0, BLOCKS)).to(tl.uint32)[None, :, None]
    low = zero + (rows & 0xFFFFFFFF).to(tl.uint32)[:, None, None]
    high = zero + (rows >> 32).to(tl.uint32)[:, None, None]
    w0, w1, w2, w3 = tl.philox(seed, lane, column, low, high, _ROUNDS)
    # [row, block, lane, word's low bit, word's high bit] -> [row, block, word, lane]
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3)).trans(0, 1, 4, 3, 2)
    words = words.reshape([BM, BLOCKS * 64])
    halves = tl.join(words & 0xFFFF, words >> 16).reshape([BM, WIDTH])
    return halves.to(tl.int32) >= threshold
