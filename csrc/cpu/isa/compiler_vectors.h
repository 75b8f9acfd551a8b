// Vectors of kLanes floats through the compiler's own vector types.
#pragma once

#include "elements.h"

namespace fastlora::FASTLORA_ISA {

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

FASTLORA_INLINE Vec zero() { return Vec{}; }
FASTLORA_INLINE Vec broadcast(float x) { return x - Vec{}; }
FASTLORA_INLINE Vec add(Vec a, Vec b) { return a + b; }
FASTLORA_INLINE Vec mul(Vec a, Vec b) { return a * b; }
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

}  // namespace fastlora::FASTLORA_ISA
