"""4-bit weights decoded to 16 bits in registers, bit-exact with bitsandbytes.

    weight[i] = rounded(code[nibble[i]] * absmax[i // blocksize])

On NVIDIA the 16 products of a block are rounded once and kept as two planes of bytes, the low and
the high ones; the nibbles of a word of eight codes are then selectors of byte permutes. On AMD and
in the interpreter a twin looks each code up. Both round the same fp32 product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import rounded

# $0..$7: codes 0..7 of the word $8 in order; $9..$12 low bytes of entries 0-3, 4-7, 8-11, 12-15 and
# $13..$16 their high bytes. A permute takes three bits of a nibble, so two permutes look up either
# half of the table (bit 3 of a selector would replicate a sign: it is masked off), and a third
# picks by the nibble's top bit.
DECODE_PTX = """{
.reg .b32 s, s2, m, m2, a, b, l0, h0, l1, h1, o;
and.b32 s, $8, 0x77777777;
shr.b32 s2, s, 16;
shr.b32 m, $8, 1;
lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA;
shr.b32 m2, m, 16;
prmt.b32 a, $9, $10, s;
prmt.b32 b, $11, $12, s;
prmt.b32 l0, a, b, m;
prmt.b32 a, $13, $14, s;
prmt.b32 b, $15, $16, s;
prmt.b32 h0, a, b, m;
prmt.b32 a, $9, $10, s2;
prmt.b32 b, $11, $12, s2;
prmt.b32 l1, a, b, m2;
prmt.b32 a, $13, $14, s2;
prmt.b32 b, $15, $16, s2;
prmt.b32 h1, a, b, m2;
prmt.b32 o, l0, h0, 0x4051;
mov.b32 {$0, $1}, o;
prmt.b32 o, l0, h0, 0x6273;
mov.b32 {$2, $3}, o;
prmt.b32 o, l1, h1, 0x4051;
mov.b32 {$4, $5}, o;
prmt.b32 o, l1, h1, 0x6273;
mov.b32 {$6, $7}, o;
}"""
LOW_BYTES_PTX = "prmt.b32 $0, $1, $2, 0x6420;"
HIGH_BYTES_PTX = "prmt.b32 $0, $1, $2, 0x7531;"
ROUND_BF16_PTX = "cvt.rn.bf16x2.f32 $0, $2, $1;"
ROUND_FP16_PTX = "cvt.rn.f16x2.f32 $0, $2, $1;"

_EIGHT_BF16 = tl.constexpr((tl.bfloat16,) * 8)
_EIGHT_FP16 = tl.constexpr((tl.float16,) * 8)
_DECODE = tl.constexpr(DECODE_PTX)
_OPERANDS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r")
_LOW_BYTES = tl.constexpr(LOW_BYTES_PTX)
_HIGH_BYTES = tl.constexpr(HIGH_BYTES_PTX)
_ROUND_BF16 = tl.constexpr(ROUND_BF16_PTX)
_ROUND_FP16 = tl.constexpr(ROUND_FP16_PTX)


@triton.jit
def block_scale(
    absmax,
    nested_absmax,
    nested_code,
    offset,
    block,
    inside,
    NESTED_BLOCKSIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """absmax of `block`, fp32; nested (NESTED_BLOCKSIZE > 0) as `reference.dequantize_absmax`.

    Zero where `inside` is false: every weight of such a block decodes to zero. WHOLE: nowhere.
    PAIRS: nested absmax is read as int16, two blocks each. For a load of bytes on the way to an
    operand, Triton gives mma.sync fragments that double the main loop.
    """
    if not WHOLE:
        # Block 0 stands in for what isn't there; its own value is discarded below.
        block = tl.where(inside, block, 0)
    if NESTED_BLOCKSIZE == 0:
        scale = tl.load(absmax + block).to(tl.float32)
    else:
        if PAIRS:
            shift = (block % 2).to(tl.int32) * 8
            index = (tl.load(absmax + block // 2).to(tl.int32) >> shift) & 255
        else:
            index = tl.load(absmax + block).to(tl.int32)
        outer = tl.load(nested_absmax + block // NESTED_BLOCKSIZE)
        scale = tl.load(nested_code + index) * outer + tl.load(offset)
    if WHOLE:
        return scale
    else:
        return tl.where(inside, scale, 0.0)


@triton.jit
def load_code(code, PERMUTE: tl.constexpr):
    """The 16 code values as scalars, to be loaded before a loop; not used by the twin."""
    if PERMUTE:
        return (
            tl.load(code), tl.load(code + 1), tl.load(code + 2), tl.load(code + 3),
            tl.load(code + 4), tl.load(code + 5), tl.load(code + 6), tl.load(code + 7),
            tl.load(code + 8), tl.load(code + 9), tl.load(code + 10), tl.load(code + 11),
            tl.load(code + 12), tl.load(code + 13), tl.load(code + 14), tl.load(code + 15),
        )  # fmt: skip
    else:
        return (0.0,)


@triton.jit
def _pair(first, second, scale, DTYPE: tl.constexpr):
    """Two products in one word, each rounded to DTYPE."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            _ROUND_BF16, "=r,r,r", [first * scale, second * scale], tl.int32, True, 1
        )
    else:
        return tl.inline_asm_elementwise(
            _ROUND_FP16, "=r,r,r", [first * scale, second * scale], tl.int32, True, 1
        )


@triton.jit
def _low(a, b):
    return tl.inline_asm_elementwise(_LOW_BYTES, "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _high(a, b):
    return tl.inline_asm_elementwise(_HIGH_BYTES, "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _look_up(words, scale, code, shift: tl.constexpr, DTYPE: tl.constexpr):
    from_table = tl.load(code + ((words >> shift) & 15))
    return rounded(from_table * scale, DTYPE)


@triton.jit
def decode(words, scale, code, values, DTYPE: tl.constexpr, PERMUTE: tl.constexpr):
    """int32 words [..., W] and fp32 scale [..., 1] -> eight weights a word, [..., W, 2, 2, 2].

    The first code of a byte is its high nibble. The three last axes count the eight weights, so
    that a reshape which merges them with W gives them in their order.
    """
    if PERMUTE:
        p0 = _pair(values[0], values[1], scale, DTYPE)
        p1 = _pair(values[2], values[3], scale, DTYPE)
        p2 = _pair(values[4], values[5], scale, DTYPE)
        p3 = _pair(values[6], values[7], scale, DTYPE)
        p4 = _pair(values[8], values[9], scale, DTYPE)
        p5 = _pair(values[10], values[11], scale, DTYPE)
        p6 = _pair(values[12], values[13], scale, DTYPE)
        p7 = _pair(values[14], values[15], scale, DTYPE)
        args = (
            words, _low(p0, p1), _low(p2, p3), _low(p4, p5), _low(p6, p7),
            _high(p0, p1), _high(p2, p3), _high(p4, p5), _high(p6, p7),
        )  # fmt: skip
        if tl.bfloat16 == DTYPE:
            eight = tl.inline_asm_elementwise(_DECODE, _OPERANDS, args, _EIGHT_BF16, True, 1)
        else:
            eight = tl.inline_asm_elementwise(_DECODE, _OPERANDS, args, _EIGHT_FP16, True, 1)
        e0, e1, e2, e3, e4, e5, e6, e7 = eight
    else:
        e0 = _look_up(words, scale, code, 4, DTYPE)
        e1 = _look_up(words, scale, code, 0, DTYPE)
        e2 = _look_up(words, scale, code, 12, DTYPE)
        e3 = _look_up(words, scale, code, 8, DTYPE)
        e4 = _look_up(words, scale, code, 20, DTYPE)
        e5 = _look_up(words, scale, code, 16, DTYPE)
        e6 = _look_up(words, scale, code, 28, DTYPE)
        e7 = _look_up(words, scale, code, 24, DTYPE)
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.join(even, odd)
