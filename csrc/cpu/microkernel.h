// The tile product that every kernel is made of.
//
//   C[i][j] (+)= sum over k of rows[i][k] * panel[k][j],   i < nr rows, j < mv vectors of lanes
//
// A `Unit` is what one lane multiplies in one instruction: a float, or a pair of bf16 neighbours along
// the summed dimension (AVX512-BF16). Sums are fp32.
#pragma once

#include "simd.h"

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

#if defined(__AVX512BF16__)
// Two bf16 a lane: vdpbf16ps.
struct Bf16Pair {
  using Unit = uint32_t;
  static constexpr int kPerUnit = 2;
  static constexpr int64_t kSumUnits = 1024;
  using Register = __m512bh;
  FASTLORA_INLINE Register load_panel(const Unit* p) { return (__m512bh)_mm512_loadu_si512(p); }
  FASTLORA_INLINE Vec multiply_add(Unit row, Register panel, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(static_cast<int>(row)), panel);
  }
};
#endif

// Strides of the row operand, in units: rows[i * row + k * step].
struct RowStride {
  int64_t row, step;
};

template <class Compute, int NR, int MV, bool kContiguous>
__attribute__((noinline)) static void tile(const typename Compute::Unit* __restrict rows,
                                           RowStride stride,
                                           const typename Compute::Unit* __restrict panel,
                                           int64_t panel_stride, int64_t units, float* __restrict C,
                                           int64_t ldc, bool accumulate) {
  const int64_t step = kContiguous ? 1 : stride.step;
  for (int64_t done = 0; done < units; done += Compute::kSumUnits) {
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
        const typename Compute::Unit r = rows[i * stride.row + k * step];
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
#else
constexpr int kRegisters = 16;
constexpr int kTileRows[kPanelVectors + 1] = {0, 12, 6};
#endif

template <class Compute, int MV, bool kContiguous, int NR>
FASTLORA_INLINE void tile_of(int nr, const typename Compute::Unit* rows, RowStride stride,
                             const typename Compute::Unit* panel, int64_t panel_stride,
                             int64_t units, float* C, int64_t ldc, bool accumulate) {
  if constexpr (NR > 0) {
    if (nr == NR) {
      tile<Compute, NR, MV, kContiguous>(rows, stride, panel, panel_stride, units, C, ldc,
                                         accumulate);
    } else {
      tile_of<Compute, MV, kContiguous, NR - 1>(nr, rows, stride, panel, panel_stride, units, C,
                                                ldc, accumulate);
    }
  }
}

template <class Compute, int MV, bool kContiguous>
static void tile_rows(int64_t nr, const typename Compute::Unit* rows, RowStride stride,
                      const typename Compute::Unit* panel, int64_t panel_stride, int64_t units,
                      float* C, int64_t ldc, bool accumulate) {
  constexpr int kRows = kTileRows[MV];
  static_assert(kRows * MV + MV <= kRegisters, "the tile must fit into the registers");
  for (int64_t i = 0; i < nr; i += kRows) {
    tile_of<Compute, MV, kContiguous, kRows>(static_cast<int>(min(kRows, nr - i)),
                                             rows + i * stride.row, stride, panel, panel_stride,
                                             units, C + i * ldc, ldc, accumulate);
  }
}

// C[nr][mv * kLanes] (+)= rows[nr][units] * panel[units][mv * kLanes].
//   mv            1 to kPanelVectors
//   rows          read as rows[i * stride.row + k * stride.step]
//   panel         row k starts at panel + k * panel_stride
//   accumulate    add to C instead of overwriting it
template <class Compute, int MV = kPanelVectors>
static void multiply(int mv, int64_t nr, const typename Compute::Unit* rows, RowStride stride,
                     const typename Compute::Unit* panel, int64_t panel_stride, int64_t units,
                     float* C, int64_t ldc, bool accumulate) {
  if constexpr (MV > 0) {
    if (mv != MV) {
      multiply<Compute, MV - 1>(mv, nr, rows, stride, panel, panel_stride, units, C, ldc,
                                accumulate);
    } else if (stride.step == 1) {
      tile_rows<Compute, MV, true>(nr, rows, stride, panel, panel_stride, units, C, ldc,
                                   accumulate);
    } else {
      tile_rows<Compute, MV, false>(nr, rows, stride, panel, panel_stride, units, C, ldc,
                                    accumulate);
    }
  }
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
