// Vectors of bf16 pairs, for CPUs that multiply two bf16 a lane and add both to fp32: AVX512-BF16 and
// NEON with FEAT_BF16. CMakeLists.txt defines FASTLORA_PAIRS for them, so that a compiler without the
// instructions fails instead of leaving them out.
//
// fp16 has none of its own, and is widened to fp32: AVX512-FP16 and NEON sum in fp16, which is off by more
// than the error policy allows from eight terms on.
#pragma once

#include "simd.h"

namespace fastlora {
namespace FASTLORA_ISA {

#if defined(FASTLORA_PAIRS) && defined(__AVX512F__)

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

#elif defined(FASTLORA_PAIRS)

using Pairs = uint32x4_t;

FASTLORA_INLINE Pairs zero_pairs() { return vdupq_n_u32(0); }
FASTLORA_INLINE Pairs broadcast_pair(uint32_t pair) { return vdupq_n_u32(pair); }
FASTLORA_INLINE Pairs load_pairs(const uint32_t* p) { return vld1q_u32(p); }
FASTLORA_INLINE void store_pairs(uint32_t* p, Pairs v) { vst1q_u32(p, v); }
FASTLORA_INLINE Pairs narrow_pairs(Vec low, Vec high) {
  return vreinterpretq_u32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
}
FASTLORA_INLINE Vec dot_pairs(Pairs a, Pairs b, Vec c) {
  return vbfdotq_f32(c, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
}

FASTLORA_INLINE Pairs load_pairs(const bf16* p, int64_t n) {
  bf16 values[2 * kLanes] = {};
  if (n < 2 * kLanes) {
    memcpy(values, p, static_cast<size_t>(n) * sizeof(bf16));
    p = values;
  }
  return vreinterpretq_u32_u16(vld1q_u16(&p->bits));
}

FASTLORA_INLINE void interleave(Pairs a, Pairs b, uint32_t* out) {
  const uint16x8_t x = vreinterpretq_u16_u32(a), y = vreinterpretq_u16_u32(b);
  store_pairs(out, vreinterpretq_u32_u16(vzip1q_u16(x, y)));
  store_pairs(out + kLanes, vreinterpretq_u32_u16(vzip2q_u16(x, y)));
}

#endif

#if defined(FASTLORA_PAIRS)
FASTLORA_INLINE Pairs load_pairs(const float* p, int64_t n) {
  return narrow_pairs(load(p, n), n > kLanes ? load(p + kLanes, n - kLanes) : zero());
}
#endif

}  // namespace FASTLORA_ISA
}  // namespace fastlora
