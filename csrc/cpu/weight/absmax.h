// absmax of 4-bit blocks in fp32, from bitsandbytes' nested statistics.
#pragma once

#include "decode4.h"

namespace fastlora::FASTLORA_ISA {

// The absmax of a 4-bit weight as it is stored, ready for look-ups.
struct Statistics {
  const Quant4bit* quant;
#if defined(__AVX512VBMI__)
  // The nested code's 256 floats as four planes of bytes: 64 look-ups take two permutes a plane.
  alignas(64) uint8_t planes[4][256];
#endif
};

[[maybe_unused]] static Statistics statistics_of(const Quant4bit& q) {
  Statistics statistics;
  statistics.quant = &q;
#if defined(__AVX512VBMI__)
  for (int i = 0; q.nested_code && i < 256; i += kLanes) {
    const __m512i bits = _mm512_loadu_si512(q.nested_code + i);
    for (int p = 0; p < 4; p++) {
      _mm_store_si128(reinterpret_cast<__m128i*>(statistics.planes[p] + i),
                      _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8 * p)));
    }
  }
#endif
  return statistics;
}

// out[i] = absmax of block begin + i in fp32, for nested statistics: product and sum rounded one after
// the other.
static inline void decode_absmax(const Statistics& statistics, int64_t begin, int64_t end,
                                 float* out) {
  const Quant4bit& q = *statistics.quant;
  const auto one = [&](int64_t b) {
    const float product = q.nested_code[q.absmax_8bit[b]] * q.nested_absmax[b / kNestedBlock];
    out[b - begin] = product + *q.nested_offset;
  };
  int64_t b = begin;
#if defined(__AVX512VBMI__)
  // Unpacking works within 128-bit lanes: this order of the dwords undoes it.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Vec offset = broadcast(*q.nested_offset);
  for (; b < end && b % 64 != 0; b++) one(b);
  for (; b + 64 <= end; b += 64) {
    prefetch(q.absmax_8bit + b + (end - begin));  // for the next rows
    const __m512i index = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(q.absmax_8bit + b));
    const __mmask64 upper = _mm512_movepi8_mask(index);
    __m512i plane[4];
    for (int p = 0; p < 4; p++) {
      const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(statistics.planes[p]), index,
                                                   _mm512_load_si512(statistics.planes[p] + 64));
      const __m512i high =
          _mm512_permutex2var_epi8(_mm512_load_si512(statistics.planes[p] + 128), index,
                                   _mm512_load_si512(statistics.planes[p] + 192));
      plane[p] = _mm512_mask_blend_epi8(upper, low, high);
    }
    const Vec scale = broadcast(q.nested_absmax[b / kNestedBlock]);
    const __m512i low01 = _mm512_unpacklo_epi8(plane[0], plane[1]);
    const __m512i high01 = _mm512_unpackhi_epi8(plane[0], plane[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(plane[2], plane[3]);
    const __m512i high23 = _mm512_unpackhi_epi8(plane[2], plane[3]);
    const __m512i floats[4] = {
        _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
        _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
    for (int i = 0; i < 4; i++) {
      store(out + (b - begin) + kLanes * i,
            add(mul(_mm512_castsi512_ps(floats[i]), scale), offset));
    }
  }
#endif
  for (; b < end; b++) one(b);
}

}  // namespace fastlora::FASTLORA_ISA
