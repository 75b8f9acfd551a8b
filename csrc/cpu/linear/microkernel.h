// The tile product of product.h, in registers.
//
// A `Unit` is what one lane multiplies in one instruction: a float, or a pair of bf16 (pairs.h). Sums
// are fp32.
#pragma once

#include "../isa/pairs.h"
#include "product.h"

namespace fastlora {
namespace FASTLORA_ISA {

// One float a lane: FMA.
struct F32 {
  using Unit = float;
  static constexpr int kPerUnit = 1;
  // Units summed in registers before they are added to C: the error of a sum grows with its length,
  // and that of a sum of sums much less.
  static constexpr int64_t kSumUnits = 64;
  using Register = Vec;
  FASTLORA_INLINE Register load_panel(const Unit* p) { return load(p); }
  FASTLORA_INLINE Vec multiply_add(Unit row, Register panel, Vec c) {
    return fma(broadcast(row), panel, c);
  }
};

#if defined(FASTLORA_PAIRS)
// Two bf16 a lane.
struct Bf16Pair {
  using Unit = uint32_t;
  static constexpr int kPerUnit = 2;
  static constexpr int64_t kSumUnits = 1024;
  using Register = Pairs;
  FASTLORA_INLINE Register load_panel(const Unit* p) { return load_pairs(p); }
  FASTLORA_INLINE Vec multiply_add(Unit row, Register panel, Vec c) {
    return dot_pairs(broadcast_pair(row), panel, c);
  }
#if defined(FASTLORA_NEON)
  // 2 x 4 times 4 x 2 in one instruction: as many products as two of dot_pairs. Two units of a panel
  // are zipped into two columns of four; two rows are read as they lie.
  template <int NR, int MV>
  FASTLORA_INLINE void tile(const Unit* rows, int64_t row_stride, const Unit* panel,
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
        const Unit* upper = rows + 2 * i * row_stride + k;
        const Unit* lower = 2 * i + 1 < NR ? upper + row_stride : upper;
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
  // Two units, or one and a zero.
  FASTLORA_INLINE uint32x2_t load_units(const Unit* p, bool both) {
    return both ? vld1_u32(p) : vset_lane_u32(*p, vdup_n_u32(0), 0);
  }
#endif
};
#endif

template <class Compute, int NR, int MV, bool kContiguous>
__attribute__((noinline)) static void tile(const TileProduct<typename Compute::Unit>& p) {
  const typename Compute::Unit* __restrict rows = p.rows.data;
  const typename Compute::Unit* __restrict panel = p.panel.data;
  float* __restrict C = p.C.data;
  const int64_t row_stride = p.rows.stride, step = kContiguous ? 1 : p.rows.step;
  const int64_t panel_stride = p.panel.stride, units = p.units, ldc = p.C.stride;
  const bool accumulate = p.C.accumulate;
  for (int64_t done = 0; done < units; done += Compute::kSumUnits) {
    if constexpr (kContiguous && requires { Compute::template tile<NR, MV>; }) {
      Compute::template tile<NR, MV>(rows + done, row_stride, panel + done * panel_stride,
                                     panel_stride, min(Compute::kSumUnits, units - done), C, ldc,
                                     accumulate || done > 0);
      continue;
    }
    Vec c[NR][MV];
#pragma GCC unroll 16
    for (int i = 0; i < NR; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < MV; j++) c[i][j] = zero();
    }
    const int64_t end = min(units, done + Compute::kSumUnits);
    for (int64_t k = done; k < end; k++) {
      typename Compute::Register p[MV];
#pragma GCC unroll 4
      for (int j = 0; j < MV; j++) p[j] = Compute::load_panel(panel + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < NR; i++) {
        const typename Compute::Unit r = rows[i * row_stride + k * step];
#pragma GCC unroll 4
        for (int j = 0; j < MV; j++) c[i][j] = Compute::multiply_add(r, p[j], c[i][j]);
      }
      panel += panel_stride;
    }
    const bool add_up = accumulate || done > 0;
#pragma GCC unroll 16
    for (int i = 0; i < NR; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < MV; j++) {
        float* out = C + i * ldc + j * kLanes;
        store(out, add_up ? add(load(out), c[i][j]) : c[i][j]);
      }
    }
  }
}

#if defined(__AVX512F__)
constexpr int kRegisters = 32;
// Rows of a tile by its width in vectors: as many accumulators as fit beside the panel's registers.
constexpr int kTileRows[kPanelVectors + 1] = {0, 12, 14, 9, 6};
#elif defined(FASTLORA_NEON)
constexpr int kRegisters = 32;
constexpr int kTileRows[kPanelVectors + 1] = {0, 12, 12, 8, 6};
#else
constexpr int kRegisters = 16;
constexpr int kTileRows[kPanelVectors + 1] = {0, 12, 6};
#endif

template <class Compute, int MV, bool kContiguous, int NR>
FASTLORA_INLINE void tile_of(const TileProduct<typename Compute::Unit>& p) {
  if constexpr (NR > 0) {
    if (p.nr == NR) {
      tile<Compute, NR, MV, kContiguous>(p);
    } else {
      tile_of<Compute, MV, kContiguous, NR - 1>(p);
    }
  }
}

template <class Compute, int MV, bool kContiguous>
static void tile_rows(const TileProduct<typename Compute::Unit>& p) {
  constexpr int kRows = kTileRows[MV];
  static_assert(kRows * MV + MV <= kRegisters, "the tile must fit into the registers");
  auto part = p;
  for (int64_t i = 0; i < p.nr; i += kRows) {
    part.nr = min(kRows, p.nr - i);
    part.rows.data = p.rows.data + i * p.rows.stride;
    part.C.data = p.C.data + i * p.C.stride;
    tile_of<Compute, MV, kContiguous, kRows>(part);
  }
}

// For mv from 1 to kPanelVectors.
template <class Compute, int MV = kPanelVectors>
static void multiply(const TileProduct<typename Compute::Unit>& p) {
  if constexpr (MV > 0) {
    if (p.mv != MV) {
      multiply<Compute, MV - 1>(p);
    } else if (p.rows.step == 1) {
      tile_rows<Compute, MV, true>(p);
    } else {
      tile_rows<Compute, MV, false>(p);
    }
  }
}

// The same for the base product, by `unit` if there is one and it can.
template <class Compute>
static void multiply_base([[maybe_unused]] PairProduct unit,
                          const TileProduct<typename Compute::Unit>& p) {
#if defined(FASTLORA_PAIRS)
  if constexpr (std::is_same_v<Compute, Bf16Pair>) {
    if (unit) return unit(p);
  }
#endif
  multiply<Compute>(p);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
