"""A 4-bit weight, or a panel of it, decoded in one launch; nested absmax in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...schemas import Packed
from ..launch import Launcher
from ..tiles import Tile
from .decode4 import block_scale, decode, load_code

# Words of eight codes that one program decodes. Panels of columns begin at a multiple of its codes.
_WORDS = 256
PANEL = 8 * _WORDS


@triton.jit(do_not_specialize=["count", "words_per_row", "first_word"])
def dequantize_4bit_kernel(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    out,
    count,
    words_per_row,
    source_words,
    first_word,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    IN_WORDS: tl.constexpr,
    PERMUTE: tl.constexpr,
    WORDS: tl.constexpr,
):
    # A program decodes WORDS words of one row; a whole weight is one row. [block, word, code of 8]
    # keeps one scale for all words of a block.
    per_block: tl.constexpr = min(WORDS, BLOCKSIZE // 8)
    blocks: tl.constexpr = WORDS // per_block
    segments = tl.cdiv(words_per_row, WORDS)
    row = (tl.program_id(0) // segments).to(tl.int64)
    start = tl.program_id(0) % segments * WORDS
    local = start + tl.arange(0, blocks)[:, None] * per_block + tl.arange(0, per_block)[None, :]
    inside = local < words_per_row
    source = row * source_words + first_word + local
    if IN_WORDS:
        words = tl.load(packed + source, mask=inside, other=0)
    else:
        words = tl.zeros([blocks, per_block], tl.int32)
        for byte in tl.static_range(4):
            there = inside & (((row * words_per_row + local) * 4 + byte) * 2 < count)
            part = tl.load(packed + source * 4 + byte, mask=there, other=0)
            words |= part.to(tl.int32) << (8 * byte)
    first = row * source_words + first_word + start + tl.arange(0, blocks)[:, None] * per_block
    scale = block_scale(
        absmax,
        nested_absmax,
        nested_code,
        offset,
        first * 8 // BLOCKSIZE,
        start + tl.arange(0, blocks)[:, None] * per_block < words_per_row,
        NESTED_BLOCKSIZE,
        False,
        False,
    )
    values = load_code(code, PERMUTE)
    weight = decode(words, scale, code, values, out.dtype.element_ty, PERMUTE)
    weight = weight.reshape([blocks, per_block * 8])
    # A weight without panels is one row, which may have 2^31 codes: 64 bits for the first of them.
    code_in_tile = tl.arange(0, blocks)[:, None] * (per_block * 8) + tl.arange(0, per_block * 8)
    at = (row * words_per_row + start) * 8 + code_in_tile
    tl.store(out + at, weight, mask=(start + code_in_tile // 8 < words_per_row) & (at < count))


def dequantize_4bit(
    gpu: Launcher,
    packed: Packed,
    out: Tensor,
    shape: tuple[int, int] | None = None,
    panel: tuple[int, int] | None = None,
    first_word: int = 0,
) -> Tensor:
    """`out = code[nibble] * absmax`, fp32 products rounded once to out's dtype.

    Args:
        out: contiguous; the whole weight, or the panel of it.
        shape: (N, K) of the weight; needed for a panel.
        panel: columns [k0, k1) of a weight whose rows are whole blocks, k0 a multiple of `PANEL`;
            all of `out`, as the weight lies in memory, when None.
        first_word: where `out` begins in the weight, in words of 8 codes; the start of a block.

    Returns:
        out.
    """
    count = out.numel()
    rows, words, source_words = 1, triton.cdiv(count, 8), 0
    if shape is not None and panel is not None:
        rows, source_words = shape[0], shape[1] // 8
        first_word, words = panel[0] // 8, (panel[1] - panel[0]) // 8
    # A 16-bit plane holds no fp32 product: fp32 takes the twin.
    permute = gpu.words and out.dtype != torch.float32
    in_words = packed.in_words
    gpu.run(
        dequantize_4bit_kernel,
        (rows * triton.cdiv(words, _WORDS),),
        packed.data.view(torch.int32) if in_words else packed.data,
        packed.absmax,
        packed.nested_absmax,
        packed.nested_code,
        packed.nested_offset,
        packed.code,
        out,
        count,
        words,
        source_words,
        first_word,
        BLOCKSIZE=packed.blocksize,
        NESTED_BLOCKSIZE=packed.nested_blocksize,
        IN_WORDS=in_words,
        PERMUTE=permute,
        WORDS=_WORDS,
        tile=Tile(1, _WORDS, 1, 4, 1),
    )
    return out
