// Vectors of fp32 lanes for the instruction set that this file is compiled for.
//
// Everything under csrc/cpu that is compiled per instruction set lives in namespace
// fastlora::FASTLORA_ISA: two objects with different flags must never share an inline function, or
// the linker keeps one copy for both and older CPUs die on it.
#pragma once

#include "elements.h"

#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#elif defined(FASTLORA_NEON)  // not __ARM_NEON: the scalar level is compiled with it, too
#include "neon.h"
#else
#include "scalar.h"
#endif

namespace fastlora::FASTLORA_ISA {

constexpr int kPanel = kLanes * kPanelVectors;  // a panel is as wide as the micro-kernel's tile

// Calls f.operator()<T>() with the C++ type of `dtype`.
template <class F>
FASTLORA_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::bf16:
      return f.template operator()<bf16>();
    case DType::f16:
      return f.template operator()<f16>();
  }
}

// Elements [begin, begin + count) of an array in fp32: where they are, or widened into `memory`.
[[maybe_unused]] static const float* in_fp32(const void* array, DType dtype, int64_t begin,
                                             int64_t count, float* memory) {
  if (dtype == DType::f32) return static_cast<const float*>(array) + begin;
  with_type(dtype, [&]<class T>() {
    const T* source = static_cast<const T*>(array) + begin;
    for (int64_t i = 0; i < count; i++) memory[i] = to_float(source[i]);
  });
  return memory;
}

// Calls f.operator()<n>() for an n from 1 to kMost.
template <int kMost, class F>
FASTLORA_INLINE void with_size(int64_t n, const F& f) {
  if constexpr (kMost > 0) {
    if (n == kMost) return f.template operator()<kMost>();
    with_size<kMost - 1>(n, f);
  }
}

}  // namespace fastlora::FASTLORA_ISA
