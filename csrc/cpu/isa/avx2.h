// AVX2 with FMA, F16C and BMI2.
#pragma once

#include <immintrin.h>

#include "elements.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kLanes = 8;
constexpr int kPanelVectors = 2;
constexpr int kRegisters = 16;
// Rows of a tile by its width in vectors: as many accumulators as fit beside the panel's registers.
constexpr int kTileRows[kPanelVectors + 1] = {0, 12, 6};

}  // namespace fastlora::FASTLORA_ISA

#include "compiler_vectors.h"

namespace fastlora::FASTLORA_ISA {

FASTLORA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

FASTLORA_INLINE Vec load(const bf16* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
FASTLORA_INLINE Vec load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTLORA_INLINE void store(bf16* p, Vec v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  r = _mm256_srli_epi32(_mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan), 16);
  r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(r));
}
FASTLORA_INLINE void store(f16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// r[i][j] <-> r[j][i], for 8 x 8 lanes.
FASTLORA_INLINE void transpose(Vec r[8]) {
  __m256 t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

}  // namespace fastlora::FASTLORA_ISA

#include "partial.h"

namespace fastlora::FASTLORA_ISA {

// ---- 4-bit codes: the sixteen values times absmax, and the look-up of kGroup codes ----------------

struct Table {
  Vec low, high;
};
FASTLORA_INLINE Table make_table(const float* code, float absmax, DType round) {
  return {round_to(mul(load(code), broadcast(absmax)), round),
          round_to(mul(load(code + 8), broadcast(absmax)), round)};
}
template <class Sink>
FASTLORA_INLINE void decode_group(const uint8_t* q, const Table& table, const Sink& sink) {
  const __m256i shift = _mm256_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0);
  const __m128i spread = _mm_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, -1, -1, -1, -1, -1, -1, -1, -1);
  for (int quarter = 0; quarter < 4; quarter++) {
    int32_t four;
    memcpy(&four, q + 4 * quarter, 4);
    const __m128i bytes = _mm_shuffle_epi8(_mm_cvtsi32_si128(four), spread);
    const __m256i index = _mm256_srlv_epi32(_mm256_cvtepu8_epi32(bytes), shift);
    // The look-up reads three bits; the fourth picks the table's half.
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    sink(8 * quarter, _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                                       _mm256_permutevar8x32_ps(table.high, index), upper));
  }
}

}  // namespace fastlora::FASTLORA_ISA
