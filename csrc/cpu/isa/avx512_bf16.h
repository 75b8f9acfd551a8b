// AVX512-BF16, with VBMI.
#pragma once

#include "avx512.h"

namespace fastlora::FASTLORA_ISA {

using Pairs = __m512i;

FASTLORA_INLINE Pairs zero_pairs() { return _mm512_setzero_si512(); }
FASTLORA_INLINE Pairs broadcast_pair(uint32_t pair) {
  return _mm512_set1_epi32(static_cast<int>(pair));
}
FASTLORA_INLINE Pairs load_pairs(const uint32_t* p) { return _mm512_loadu_si512(p); }
FASTLORA_INLINE void store_pairs(uint32_t* p, Pairs v) { _mm512_storeu_si512(p, v); }
FASTLORA_INLINE Pairs narrow_pairs(Vec low, Vec high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
// c[lane] + a[2 lane] b[2 lane] + a[2 lane + 1] b[2 lane + 1]
FASTLORA_INLINE Vec dot_pairs(Pairs a, Pairs b, Vec c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}

// Neighbouring elements as bf16, those past n zero.
FASTLORA_INLINE Pairs load_pairs(const bf16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p);
}

// The same columns of rows a and b as pairs (a, b), in two vectors.
FASTLORA_INLINE void interleave(Pairs a, Pairs b, uint32_t* out) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  store_pairs(out, _mm512_permutex2var_epi16(a, low, b));
  store_pairs(out + kLanes, _mm512_permutex2var_epi16(a, high, b));
}

struct PairTiles {};  // no instruction for them

// ---- 4-bit codes in 16 bits: a table of sixteen words, and the look-up of kGroup codes ------------

// Both halves are the same: a look-up reads five bits, of which the fifth is noise here.
struct WordTable {
  __m512i words;
};
FASTLORA_INLINE WordTable word_table(__m256i words) { return {_mm512_broadcast_i64x4(words)}; }
FASTLORA_INLINE WordTable bf16_words(const float* code, float absmax) {
  return word_table((__m256i)_mm512_cvtneps_pbh(mul(load(code), broadcast(absmax))));
}
template <class Sink>
FASTLORA_INLINE void decode_words(const uint8_t* q, const WordTable& table, const Sink& sink) {
  const __m512i shift = _mm512_set1_epi32(4);  // even elements: the high nibble
  const __m512i spread =
      _mm512_setr_epi32(0x00000000, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505,
                        0x06060606, 0x07070707, 0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b,
                        0x0c0c0c0c, 0x0d0d0d0d, 0x0e0e0e0e, 0x0f0f0f0f);
  const __m512i bytes =
      _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
  const __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi8(spread, bytes), shift);
  sink(0, _mm512_permutexvar_epi16(index, table.words));
}

// The code times absmax_low and, in the upper sixteen of 32 bf16, times absmax_high.
FASTLORA_INLINE __m512i bf16_table(const float* code, float absmax_low, float absmax_high) {
  const Vec values = load(code);
  return (__m512i)_mm512_cvtne2ps_pbh(mul(values, broadcast(absmax_high)),
                                      mul(values, broadcast(absmax_low)));
}

// 32 columns of rows a and b as pairs (a, b), in two vectors of 16 lanes in natural order. A table of
// 32 values serves both rows: the fifth bit of the index tells the row.
FASTLORA_INLINE void decode_pairs(const uint8_t* a, const uint8_t* b, __m512i table,
                                  uint32_t* out) {
  const __m512i bytes = _mm512_castsi256_si512(
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)a)),
                              _mm_loadu_si128((const __m128i*)b), 1));
  // Lane j of vector v: byte 8 v + j / 2 of row a in the low word, of row b in the high word.
  const __m512i spread =
      _mm512_setr_epi32(0x10100000, 0x10100000, 0x11110101, 0x11110101, 0x12120202, 0x12120202,
                        0x13130303, 0x13130303, 0x14140404, 0x14140404, 0x15150505, 0x15150505,
                        0x16160606, 0x16160606, 0x17170707, 0x17170707);
  const __m512i shift = _mm512_set1_epi64(0x0000000000040004);  // even columns: the high nibble
  const __m512i nibble = _mm512_set1_epi32(0x000f000f), row_b = _mm512_set1_epi32(0x00100000);
  for (int v = 0; v < 2; v++) {
    const __m512i pick = _mm512_add_epi8(spread, _mm512_set1_epi8(static_cast<char>(8 * v)));
    __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi8(pick, bytes), shift);
    index = _mm512_ternarylogic_epi32(index, nibble, row_b, 0xea);  // (index & nibble) | row_b
    _mm512_storeu_si512(out + v * kLanes, _mm512_permutexvar_epi16(index, table));
  }
}

}  // namespace fastlora::FASTLORA_ISA
