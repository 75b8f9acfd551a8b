"""The dropout mask of a tile, computed where it is used and defined in `reference.dropout_mask`."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....reference import PHILOX_ROUNDS, dropout_threshold

# One Philox block covers this many neighbouring columns; tiles begin at a multiple of it.
BLOCK = 128
_BLOCK = tl.constexpr(BLOCK)
_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


class Dropout(NamedTuple):
    """How the LoRA term of a result is masked.

    Args:
        seed: int64 [1] on the device; None for no dropout.
        threshold, scale: of `reference.dropout_threshold`.
        first_block: block of 128 columns at which the result begins, for a panel of it.
    """

    seed: Tensor | None = None
    threshold: int = 0
    scale: float = 1.0
    first_block: int = 0

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> Dropout:
        """Dropout with probability p."""
        return cls(seed, *dropout_threshold(p)) if p > 0.0 else cls()

    def at(self, column: int) -> Dropout:
        """This dropout for a panel that begins at `column`, a multiple of 128."""
        return self._replace(first_block=column // BLOCK)


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
