// NEON with FEAT_BF16.
#pragma once

#include "neon.h"

namespace fastlora::FASTLORA_ISA {

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

// Two units, or one and a zero.
FASTLORA_INLINE uint32x2_t load_units(const uint32_t* p, bool both) {
  return both ? vld1_u32(p) : vset_lane_u32(*p, vdup_n_u32(0), 0);
}

struct PairTiles {
  // 2 x 4 times 4 x 2 in one instruction: as many products as two of dot_pairs. Two units of a panel
  // are zipped into two columns of four; two rows are read as they lie.
  template <int NR, int MV>
  FASTLORA_INLINE void tile(const uint32_t* rows, int64_t row_stride, const uint32_t* panel,
                            int64_t panel_stride, int64_t units, float* C, int64_t ldc,
                            bool accumulate) {
    constexpr int kRowPairs = (NR + 1) / 2;
    Vec c[kRowPairs][2 * MV];  // [row][column] of 2 x 2
    for (int i = 0; i < kRowPairs; i++) {
      for (int j = 0; j < 2 * MV; j++) c[i][j] = zero();
    }
    const auto step = [&](int64_t k, bool both) __attribute__((always_inline)) {
      bfloat16x8_t r[kRowPairs];
#pragma GCC unroll 8
      for (int i = 0; i < kRowPairs; i++) {
        const uint32_t* upper = rows + 2 * i * row_stride + k;
        const uint32_t* lower = 2 * i + 1 < NR ? upper + row_stride : upper;
        r[i] =
            vreinterpretq_bf16_u32(vcombine_u32(load_units(upper, both), load_units(lower, both)));
      }
#pragma GCC unroll 4
      for (int j = 0; j < MV; j++) {
        const Pairs first = load_pairs(panel + k * panel_stride + j * kLanes);
        const Pairs second =
            both ? load_pairs(panel + (k + 1) * panel_stride + j * kLanes) : zero_pairs();
        const uint32x4x2_t columns = vzipq_u32(first, second);
#pragma GCC unroll 8
        for (int i = 0; i < kRowPairs; i++) {
          for (int half = 0; half < 2; half++) {
            Vec& sum = c[i][2 * j + half];
            sum = vbfmmlaq_f32(sum, r[i], vreinterpretq_bf16_u32(columns.val[half]));
          }
        }
      }
    };
    int64_t k = 0;
    for (; k + 2 <= units; k += 2) step(k, true);
    if (k < units) step(k, false);
    for (int i = 0; i < NR; i++) {
      for (int j = 0; j < MV; j++) {
        const float64x2_t low = vreinterpretq_f64_f32(c[i / 2][2 * j]);
        const float64x2_t high = vreinterpretq_f64_f32(c[i / 2][2 * j + 1]);
        const Vec row =
            vreinterpretq_f32_f64(i % 2 ? vzip2q_f64(low, high) : vzip1q_f64(low, high));
        float* out = C + i * ldc + j * kLanes;
        store(out, accumulate ? add(load(out), row) : row);
      }
    }
  }
};

// ---- 4-bit codes in 16 bits: a table of sixteen words, and the look-up of kGroup codes ------------

struct WordTable {
  uint8x16x2_t bytes;  // low and high
};
FASTLORA_INLINE WordTable bf16_words(const float* code, float absmax) {
  uint32_t pairs[8];
  for (int j = 0; j < 8; j += kLanes) {
    store_pairs(pairs + j, narrow_pairs(mul(load(code + 2 * j), broadcast(absmax)),
                                        mul(load(code + 2 * j + kLanes), broadcast(absmax))));
  }
  return {vld2q_u8(reinterpret_cast<const uint8_t*>(pairs))};
}
template <class Sink>
FASTLORA_INLINE void decode_words(const uint8_t* q, const WordTable& table, const Sink& sink) {
  const uint8x16x2_t codes = split_codes(q);
  for (int half = 0; half < 2; half++) {
    const uint8x16x2_t words = vzipq_u8(vqtbl1q_u8(table.bytes.val[0], codes.val[half]),
                                        vqtbl1q_u8(table.bytes.val[1], codes.val[half]));
    sink(16 * half, vreinterpretq_u32_u8(words.val[0]));
    sink(16 * half + 8, vreinterpretq_u32_u8(words.val[1]));
  }
}

}  // namespace fastlora::FASTLORA_ISA
