// Vectors of fp32 lanes for the instruction set that this file is compiled for.
//
// Everything under csrc/cpu that is compiled per instruction set lives in namespace
// fastlora::FASTLORA_ISA: two objects with different flags must never share an inline function, or
// the linker keeps one copy for both and older CPUs die on it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../common/params.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(FASTLORA_NEON)
#include <arm_neon.h>
#endif

#define FASTLORA_INLINE static inline __attribute__((always_inline))

namespace fastlora {
namespace FASTLORA_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kPanelVectors = 4;  // a panel is as wide as the micro-kernel's tile
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kPanelVectors = 2;
#elif defined(FASTLORA_NEON)  // not __ARM_NEON: the scalar level is compiled with it, too
constexpr int kLanes = 4;
constexpr int kPanelVectors = 4;
#else
constexpr int kLanes = 4;
constexpr int kPanelVectors = 2;
#endif
constexpr int kPanel = kLanes * kPanelVectors;

FASTLORA_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLORA_INLINE int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
FASTLORA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTLORA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- one element -------------------------------------------------------------------------------

FASTLORA_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FASTLORA_INLINE float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
FASTLORA_INLINE float to_float(float x) { return x; }
FASTLORA_INLINE float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
FASTLORA_INLINE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  // 2^112 moves the exponent bias from 15 to 127; denormals come out exact.
  const float scaled = bits_float(magnitude << 13) * bits_float(0x77800000);
  return bits_float(sign | float_bits(scaled));
}
FASTLORA_INLINE void from_float(float x, float& out) { out = x; }
FASTLORA_INLINE void from_float(float x, bf16& out) {
  const uint32_t u = float_bits(x);
  out.bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
FASTLORA_INLINE void from_float(float x, f16& out) {
  const uint32_t u = float_bits(x), magnitude = u & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  if (magnitude > 0x7f800000) {
    out.bits = sign | 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    out.bits = sign | 0x7c00;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000) {
    // Below 2^-14 the result is a multiple of 2^-24: adding 0.5 rounds to that, ties to even.
    const float rounded = bits_float(magnitude) + 0.5f;
    out.bits = static_cast<uint16_t>(sign | (float_bits(rounded) - 0x3f000000));
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    out.bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
  }
}

// ---- one vector --------------------------------------------------------------------------------

#if defined(__AVX512F__)

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
  // The instruction flushes denormals to zero, so it serves where there are none.
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

#else  // AVX2, NEON, or any CPU through the compiler's own vectors

#if defined(FASTLORA_NEON)

using Vec = float32x4_t;

FASTLORA_INLINE Vec zero() { return vdupq_n_f32(0); }
FASTLORA_INLINE Vec broadcast(float x) { return vdupq_n_f32(x); }
FASTLORA_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
FASTLORA_INLINE Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
FASTLORA_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
FASTLORA_INLINE float sum(Vec v) { return vaddvq_f32(v); }
FASTLORA_INLINE Vec keep(Vec v, uint32_t bits) {
  constexpr uint32_t kBit[kLanes] = {1, 2, 4, 8};
  const uint32x4_t mask = vtstq_u32(vdupq_n_u32(bits), vld1q_u32(kBit));
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), mask));
}

FASTLORA_INLINE Vec load(const float* p) { return vld1q_f32(p); }
FASTLORA_INLINE Vec load(const bf16* p) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(&p->bits)), 16));
}
FASTLORA_INLINE Vec load(const f16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
}
FASTLORA_INLINE void store(float* p, Vec v) { vst1q_f32(p, v); }
FASTLORA_INLINE void store(bf16* p, Vec v) {
  const uint32x4_t u = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t r = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t number = vceqq_f32(v, v);
  vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(number, r, vdupq_n_u32(0x7fc00000)), 16));
}
FASTLORA_INLINE void store(f16* p, Vec v) {
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)));
}

// r[i][j] <-> r[j][i], for 4 x 4 lanes of 32 bits.
FASTLORA_INLINE void transpose(uint32x4_t r[4]) {
  const uint32x4_t even01 = vtrn1q_u32(r[0], r[1]), odd01 = vtrn2q_u32(r[0], r[1]);
  const uint32x4_t even23 = vtrn1q_u32(r[2], r[3]), odd23 = vtrn2q_u32(r[2], r[3]);
  const auto halves = [](uint32x4_t a, uint32x4_t b, bool second) {
    const uint64x2_t x = vreinterpretq_u64_u32(a), y = vreinterpretq_u64_u32(b);
    return vreinterpretq_u32_u64(second ? vtrn2q_u64(x, y) : vtrn1q_u64(x, y));
  };
  r[0] = halves(even01, even23, false);
  r[1] = halves(odd01, odd23, false);
  r[2] = halves(even01, even23, true);
  r[3] = halves(odd01, odd23, true);
}
FASTLORA_INLINE void transpose(Vec r[4]) {
  uint32x4_t t[4];
  for (int i = 0; i < 4; i++) t[i] = vreinterpretq_u32_f32(r[i]);
  transpose(t);
  for (int i = 0; i < 4; i++) r[i] = vreinterpretq_f32_u32(t[i]);
}

#else

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

FASTLORA_INLINE Vec zero() { return Vec{}; }
FASTLORA_INLINE Vec broadcast(float x) { return x - Vec{}; }
FASTLORA_INLINE Vec add(Vec a, Vec b) { return a + b; }
FASTLORA_INLINE Vec mul(Vec a, Vec b) { return a * b; }
FASTLORA_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
FASTLORA_INLINE float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
}
FASTLORA_INLINE Vec keep(Vec v, uint32_t bits) {
  IntVec mask;
  for (int i = 0; i < kLanes; i++) mask[i] = -static_cast<int32_t>((bits >> i) & 1);
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(v) & mask);
}

FASTLORA_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTLORA_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

#if defined(__AVX2__)
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
#else
template <class T>
FASTLORA_INLINE Vec load(const T* p) {
  Vec v;
  for (int i = 0; i < kLanes; i++) v[i] = to_float(p[i]);
  return v;
}
template <class T>
FASTLORA_INLINE void store(T* p, Vec v) {
  for (int i = 0; i < kLanes; i++) from_float(v[i], p[i]);
}
#endif

// r[i][j] <-> r[j][i], for kLanes x kLanes lanes.
FASTLORA_INLINE void transpose(Vec r[kLanes]) {
#if defined(__AVX2__)
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
#else
  Vec t[kLanes];
  for (int i = 0; i < kLanes; i++) {
    for (int j = 0; j < kLanes; j++) t[i][j] = r[j][i];
  }
  for (int i = 0; i < kLanes; i++) r[i] = t[i];
#endif
}

#endif

// The first n lanes, the others zero; reads nothing past them.
template <class T>
FASTLORA_INLINE Vec load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = to_float(p[i]);
  return load(lanes);
}
template <class T>
FASTLORA_INLINE void store(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  for (int64_t i = 0; i < n; i++) from_float(v[i], p[i]);
}

// Rounds each lane to `dtype` and back.
FASTLORA_INLINE Vec round_to(Vec v, DType dtype) {
  if (dtype == DType::bf16) {
    bf16 t[kLanes];
    store(t, v);
    return load(t);
  }
  if (dtype == DType::f16) {
    f16 t[kLanes];
    store(t, v);
    return load(t);
  }
  return v;
}

#endif

// Calls f with a null pointer of the C++ type of `dtype`.
template <class F>
FASTLORA_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<const float*>(nullptr));
    case DType::bf16:
      return f(static_cast<const bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<const f16*>(nullptr));
  }
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
