// Parts of a vector and rounding, by way of memory: for sets without masked loads.
#pragma once

#include "elements.h"

namespace fastlora::FASTLORA_ISA {

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

}  // namespace fastlora::FASTLORA_ISA
