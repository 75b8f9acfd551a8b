// The tile product of product.h, in registers: NR rows times MV vectors at a time.
#pragma once

#include "../isa/compute.h"
#include "../isa/product.h"

namespace fastlora::FASTLORA_ISA {

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

template <class Compute, int MV, bool kContiguous>
static void tile_rows(const TileProduct<typename Compute::Unit>& p) {
  constexpr int kRows = kTileRows[MV];
  static_assert(kRows * MV + MV <= kRegisters, "the tile must fit into the registers");
  auto part = p;
  for (int64_t i = 0; i < p.nr; i += kRows) {
    part.nr = min(kRows, p.nr - i);
    part.rows.data = p.rows.data + i * p.rows.stride;
    part.C.data = p.C.data + i * p.C.stride;
    with_size<kRows>(part.nr, [&]<int NR>() __attribute__((always_inline)) {
      tile<Compute, NR, MV, kContiguous>(part);
    });
  }
}

// For mv from 1 to kPanelVectors.
template <class Compute>
static void multiply(const TileProduct<typename Compute::Unit>& p) {
  with_size<kPanelVectors>(p.mv, [&]<int MV>() __attribute__((always_inline)) {
    p.rows.step == 1 ? tile_rows<Compute, MV, true>(p) : tile_rows<Compute, MV, false>(p);
  });
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

}  // namespace fastlora::FASTLORA_ISA
