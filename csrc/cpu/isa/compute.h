// What one lane multiplies in one instruction, a `Unit`: a float, or a pair of bf16 that are neighbours
// along the summed dimension. Sums are fp32.
#pragma once

#include "pairs.h"

namespace fastlora::FASTLORA_ISA {

// One float a lane: FMA.
struct F32 {
  using Unit = float;
  static constexpr int kPerUnit = 1;
  // Units summed in registers before they are added to C: the error of a sum grows with its length,
  // and that of a sum of sums much less.
  static constexpr int64_t kSumUnits = 64;
  using Register = Vec;
  FASTLORA_INLINE Register load_panel(const Unit* p) { return load(p); }
  // Of elements, those past n zero.
  template <class X>
  FASTLORA_INLINE Register read(const X* p, int64_t n) {
    return load(p, n);
  }
  FASTLORA_INLINE Register nothing() { return zero(); }
  FASTLORA_INLINE void write(Unit* p, Register v) { store(p, v); }
  FASTLORA_INLINE Vec multiply_add(Unit row, Register panel, Vec c) {
    return fma(broadcast(row), panel, c);
  }
};

#if defined(FASTLORA_PAIRS)
// Two bf16 a lane.
struct Bf16Pair : PairTiles {
  using Unit = uint32_t;
  static constexpr int kPerUnit = 2;
  static constexpr int64_t kSumUnits = 1024;
  using Register = Pairs;
  FASTLORA_INLINE Register load_panel(const Unit* p) { return load_pairs(p); }
  template <class X>
  FASTLORA_INLINE Register read(const X* p, int64_t n) {
    return load_pairs(p, n);
  }
  FASTLORA_INLINE Register nothing() { return zero_pairs(); }
  FASTLORA_INLINE void write(Unit* p, Register v) { store_pairs(p, v); }
  FASTLORA_INLINE Vec multiply_add(Unit row, Register panel, Vec c) {
    return dot_pairs(broadcast_pair(row), panel, c);
  }
};
#endif

}  // namespace fastlora::FASTLORA_ISA
