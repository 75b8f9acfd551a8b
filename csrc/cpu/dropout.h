// Keep bits of dropout, computed from the seed whenever they are needed and never stored.
#pragma once

#include "../common/philox.h"
#include "isa/simd.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kKeepWords = kDropoutBlock / 32;

// Bits of row m, elements [128 block, 128 block + 128): bit k % 32 of bits[(k % 128) / 32] is set
// where element k is kept. The map is stated in philox.h.
FASTLORA_INLINE void keep_bits(int64_t m, int64_t block, const Dropout& dropout,
                               uint32_t bits[kKeepWords]) {
  if (dropout.threshold > 0xffff) {
    for (int i = 0; i < kKeepWords; i++) bits[i] = 0;
    return;
  }
  uint32_t k0 = dropout.key[0], k1 = dropout.key[1];
#if defined(__AVX512BW__)
  const __m512i multiply0 = _mm512_set1_epi64(kPhiloxM0), multiply1 = _mm512_set1_epi64(kPhiloxM1);
  __m512i c0 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i c1 = _mm512_set1_epi32(static_cast<int>(block));
  __m512i c2 = _mm512_set1_epi32(static_cast<int>(m));
  __m512i c3 = _mm512_set1_epi32(static_cast<int>(m >> 32));
  // 32 x 32 -> 64 bits exists for even lanes only: odd lanes are moved down and the halves merged.
  const auto product = [](__m512i c, __m512i factor, __m512i& high, __m512i& low) {
    const __m512i even = _mm512_mul_epu32(c, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(c, 32), factor);
    low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  };
  for (int round = 0; round < kPhiloxRounds; round++) {
    __m512i high0, low0, high1, low1;
    product(c0, multiply0, high0, low0);
    product(c2, multiply1, high1, low1);
    c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(static_cast<int>(k0)), 0x96);
    c1 = low1;
    c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(static_cast<int>(k1)), 0x96);
    c3 = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  const __m512i threshold = _mm512_set1_epi16(static_cast<short>(dropout.threshold));
  bits[0] = _mm512_cmpge_epu16_mask(c0, threshold);
  bits[1] = _mm512_cmpge_epu16_mask(c1, threshold);
  bits[2] = _mm512_cmpge_epu16_mask(c2, threshold);
  bits[3] = _mm512_cmpge_epu16_mask(c3, threshold);
#else
  uint32_t c[4][16];
  for (int j = 0; j < 16; j++) {
    c[0][j] = static_cast<uint32_t>(j);
    c[1][j] = static_cast<uint32_t>(block);
    c[2][j] = static_cast<uint32_t>(m);
    c[3][j] = static_cast<uint32_t>(static_cast<uint64_t>(m) >> 32);
  }
  for (int round = 0; round < kPhiloxRounds; round++) {
    for (int j = 0; j < 16; j++) {
      const uint64_t product0 = static_cast<uint64_t>(c[0][j]) * kPhiloxM0;
      const uint64_t product1 = static_cast<uint64_t>(c[2][j]) * kPhiloxM1;
      c[0][j] = static_cast<uint32_t>(product1 >> 32) ^ c[1][j] ^ k0;
      c[1][j] = static_cast<uint32_t>(product1);
      c[2][j] = static_cast<uint32_t>(product0 >> 32) ^ c[3][j] ^ k1;
      c[3][j] = static_cast<uint32_t>(product0);
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  for (int i = 0; i < kKeepWords; i++) {
    uint32_t word = 0;
    for (int j = 0; j < 16; j++) {
      word |= static_cast<uint32_t>((c[i][j] & 0xffff) >= dropout.threshold) << (2 * j);
      word |= static_cast<uint32_t>((c[i][j] >> 16) >= dropout.threshold) << (2 * j + 1);
    }
    bits[i] = word;
  }
#endif
}

// Keep bits of rows [m, m + rows) and columns [k, k + count), k a multiple of 128, one row after the
// other, `words` = ceil(count / 128) * 4 words each.
FASTLORA_INLINE void keep_bits_of(int64_t m, int64_t rows, int64_t k, int64_t count,
                                  const Dropout& dropout, uint32_t* bits) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t block = k / kDropoutBlock; block * kDropoutBlock < k + count; block++) {
      keep_bits(m + i, block, dropout, bits);
      bits += kKeepWords;
    }
  }
}

// 1 - scale without its cancellation: the factor of a kept element in x - drop(x).
FASTLORA_INLINE float missing_share(const Dropout& dropout) {
  const double threshold = dropout.threshold;
  return threshold < 65536 ? static_cast<float>(-threshold / (65536 - threshold)) : 1.0f;
}

// The bits of lanes [k, k + kLanes) of a row of keep bits.
FASTLORA_INLINE uint32_t lane_bits(const uint32_t* row, int64_t k) {
  return row[k / 32] >> (k % 32);
}

}  // namespace fastlora::FASTLORA_ISA
