// NEON, as every AArch64 processor has it.
#pragma once

#include <arm_neon.h>

#include "elements.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kLanes = 4;
constexpr int kPanelVectors = 4;
constexpr int kRegisters = 32;
// Rows of a tile by its width in vectors: as many accumulators as fit beside the panel's registers.
constexpr int kTileRows[kPanelVectors + 1] = {0, 12, 12, 8, 6};

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

}  // namespace fastlora::FASTLORA_ISA

#include "partial.h"

namespace fastlora::FASTLORA_ISA {

// ---- 4-bit codes: the sixteen values times absmax, and the look-up of kGroup codes ----------------

// The sixteen floats as four planes of bytes: a look-up finds bytes.
struct Table {
  uint8x16x4_t planes;
};
FASTLORA_INLINE Table make_table(const float* code, float absmax, DType round) {
  float values[16];
  for (int i = 0; i < 16; i += kLanes) {
    store(values + i, round_to(mul(load(code + i), broadcast(absmax)), round));
  }
  return {vld4q_u8(reinterpret_cast<const uint8_t*>(values))};
}
// Sixteen codes from each half of 16 bytes, one a byte; the even one lies in the high nibble.
FASTLORA_INLINE uint8x16x2_t split_codes(const uint8_t* q) {
  const uint8x16_t bytes = vld1q_u8(q);
  return vzipq_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15)));
}
template <class Sink>
FASTLORA_INLINE void decode_group(const uint8_t* q, const Table& table, const Sink& sink) {
  const uint8x16x2_t codes = split_codes(q);
  for (int half = 0; half < 2; half++) {
    uint8x16_t byte[4];
    for (int i = 0; i < 4; i++) byte[i] = vqtbl1q_u8(table.planes.val[i], codes.val[half]);
    const uint8x16x2_t low = vzipq_u8(byte[0], byte[1]), high = vzipq_u8(byte[2], byte[3]);
    for (int i = 0; i < 2; i++) {
      const uint16x8x2_t words =
          vzipq_u16(vreinterpretq_u16_u8(low.val[i]), vreinterpretq_u16_u8(high.val[i]));
      sink(16 * half + 8 * i, vreinterpretq_f32_u16(words.val[0]));
      sink(16 * half + 8 * i + kLanes, vreinterpretq_f32_u16(words.val[1]));
    }
  }
}

}  // namespace fastlora::FASTLORA_ISA
