// AVX-512 with F, BW, VL and DQ.
#pragma once

#include <immintrin.h>

#include "elements.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kLanes = 16;
constexpr int kPanelVectors = 4;
constexpr int kRegisters = 32;
// Rows of a tile by its width in vectors: as many accumulators as fit beside the panel's registers.
constexpr int kTileRows[kPanelVectors + 1] = {0, 12, 14, 9, 6};

using Vec = __m512;

FASTLORA_INLINE __mmask16 first(int64_t n) {
  return n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1);
}
FASTLORA_INLINE Vec zero() { return _mm512_setzero_ps(); }
FASTLORA_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
FASTLORA_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
FASTLORA_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
FASTLORA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
FASTLORA_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
FASTLORA_INLINE Vec keep(Vec v, uint32_t bits) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v);
}

FASTLORA_INLINE Vec widen_bf16(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
// Nearest even, NaN kept, denormals kept.
FASTLORA_INLINE __m256i narrow_bf16(Vec v) {
#if defined(__AVX512BF16__)
  // The instruction flushes denormals to zero, so it is used where there are none.
  constexpr int kDenormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(v, kDenormal) == 0, 1)) {
    return (__m256i)_mm512_cvtneps_pbh(v);
  }
#endif
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}

FASTLORA_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
FASTLORA_INLINE Vec load(const bf16* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTLORA_INLINE Vec load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The first n lanes, the others zero; reads nothing past them.
FASTLORA_INLINE Vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
FASTLORA_INLINE Vec load(const bf16* p, int64_t n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
}
FASTLORA_INLINE Vec load(const f16* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
}

FASTLORA_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
FASTLORA_INLINE void store(bf16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v));
}
FASTLORA_INLINE void store(f16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FASTLORA_INLINE void store(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
FASTLORA_INLINE void store(bf16* p, Vec v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(v));
}
FASTLORA_INLINE void store(f16* p, Vec v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n),
                           _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Rounds each lane to `dtype` and back.
FASTLORA_INLINE Vec round_to(Vec v, DType dtype) {
  if (dtype == DType::bf16) return widen_bf16(narrow_bf16(v));
  if (dtype == DType::f16) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  return v;
}

// r[i][j] <-> r[j][i], for 16 x 16 lanes of 32 bits.
FASTLORA_INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}
FASTLORA_INLINE void transpose(Vec r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i++) t[i] = _mm512_castps_si512(r[i]);
  transpose(t);
  for (int i = 0; i < 16; i++) r[i] = _mm512_castsi512_ps(t[i]);
}

// ---- 4-bit codes: the sixteen values times absmax, and the look-up of kGroup codes ----------------

struct Table {
  Vec values;
};
FASTLORA_INLINE Table make_table(const float* code, float absmax, DType round) {
  return {round_to(mul(load(code), broadcast(absmax)), round)};
}
// Two vectors of 16 from 16 bytes.
template <class Sink>
FASTLORA_INLINE void decode_group(const uint8_t* q, const Table& table, const Sink& sink) {
  for (int half = 0; half < 2; half++) {
    const __m512i byte =
        _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + 8 * half)));
    // The even code lies in the high nibble; the look-up ignores all but four bits of a lane.
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
    sink(16 * half, _mm512_permutexvar_ps(index, table.values));
  }
}

}  // namespace fastlora::FASTLORA_ISA
