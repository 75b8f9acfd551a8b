"""Products on tensor cores: how operands are rounded and split into parts.

The adapter's side of a product is often fp32 while tokens are bf16 or fp16. It is then split into
16-bit parts whose sum is the fp32 value, so that the tokens are read once, in their own dtype, and
the product still has the quality of fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter holds bf16 as bits: it multiplies them as integers and truncates where a GPU
# rounds. The two branches below give it what a GPU computes; compiled code never contains them.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """`value` in DTYPE, rounded to nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE and value.dtype != tl.bfloat16:
        wide = value.to(tl.float32)
        bits = wide.to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        nearest = ((bits + (even + 0x7FFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(wide == wide, nearest, wide).to(DTYPE)
    else:
        return value.to(DTYPE)


@triton.jit
def dot(a, b, acc):
    """`acc + a b` for a [m, c] and b [c, n] of one dtype, summed in fp32; fp32 stays fp32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_wide(narrow, wide, acc, EXACT: tl.constexpr):
    """`acc + narrow wide`: tokens [m, c] in their dtype, wide [c, n] in fp32 or the same dtype.

    EXACT: an fp32 `wide` keeps its 24 bits, as three parts. Otherwise it is rounded to the
    tokens' dtype first, as PEFT does if the adapter has that dtype.
    """
    if narrow.dtype == wide.dtype:
        return dot(narrow, wide, acc)
    elif not EXACT:
        return dot(narrow, rounded(wide, narrow.dtype), acc)
    elif narrow.dtype == tl.bfloat16:
        high = rounded(wide, tl.bfloat16)
        rest = wide - high.to(tl.float32)
        middle = rounded(rest, tl.bfloat16)
        low = rounded(rest - middle.to(tl.float32), tl.bfloat16)
        # The smallest part first: each sum then loses least.
        acc = dot(narrow, low, acc)
        acc = dot(narrow, middle, acc)
        return dot(narrow, high, acc)
    else:
        # fp16 has 11 bits a part but little range: the remainder is scaled up by 2^11 before
        # it is rounded, and all of it down by 2^8, so that values up to 1.6e7 fit.
        rest = wide * (1 / 256)
        first = rest.to(tl.float16)
        rest = (rest - first.to(tl.float32)) * 2048
        second = rest.to(tl.float16)
        third = ((rest - second.to(tl.float32)) * 2048).to(tl.float16)
        total = dot(narrow, third, tl.zeros_like(acc))
        total = dot(narrow, second, total * (1 / 2048))
        return acc + dot(narrow, first, total * (1 / 2048)) * 256


@triton.jit
def column_sums(values):
    """Sum over the rows of [m, n], m a multiple of 16, in fp32."""
    wide = values.to(tl.float32)
    if INTERPRETED:
        # It adds row after row, which loses more than a GPU's tree of sums.
        pairs: tl.constexpr = values.shape[0] // 16
        wide = tl.sum(wide.reshape([pairs, 16, values.shape[1]]), axis=0)
    return tl.sum(wide, axis=0)


@triton.jit
def dot_either(a, b, acc, SWAP: tl.constexpr):
    """`acc + a b`; with SWAP acc is the transposed product, `acc + b^T a^T`."""
    if SWAP:
        return dot(tl.trans(b), tl.trans(a), acc)
    else:
        return dot(a, b, acc)


@triton.jit
def dot_adapter(p, q, acc, BASE: tl.constexpr, SWAP: tl.constexpr):
    """`acc + p q`, the LoRA term beside a product in BASE: p [m, r] fp32, q [r, n] fp32 or 16-bit.

    A 16-bit adapter takes p rounded, as in PEFT. An fp32 adapter beside a 16-bit product takes both
    as a high and a low bf16 part, without the product of the low parts: 16 bits, above BASE's 8 or
    11.
    """
    if q.dtype != tl.float32:
        return dot_either(rounded(p, q.dtype), q, acc, SWAP)
    elif BASE == tl.float32:
        return dot_either(p, q, acc, SWAP)
    else:
        p_high, q_high = rounded(p, tl.bfloat16), rounded(q, tl.bfloat16)
        p_low = rounded(p - p_high.to(tl.float32), tl.bfloat16)
        q_low = rounded(q - q_high.to(tl.float32), tl.bfloat16)
        acc = dot_either(p_low, q_high, acc, SWAP)
        acc = dot_either(p_high, q_low, acc, SWAP)
        return dot_either(p_high, q_high, acc, SWAP)
