// Vectors of bf16 pairs, for CPUs that multiply two bf16 a lane and add both to fp32: AVX512-BF16 and
// NEON with FEAT_BF16. CMakeLists.txt defines FASTLORA_PAIRS for them, so that a compiler without the
// instructions fails instead of leaving them out.
//
// fp16 is widened to fp32 instead: AVX512-FP16 and NEON sum in fp16, and from eight terms on the error
// is more than the error policy allows.
#pragma once

#include "simd.h"

#if defined(FASTLORA_PAIRS)

#if defined(__AVX512F__)
#include "avx512_bf16.h"
#else
#include "neon_bf16.h"
#endif

namespace fastlora::FASTLORA_ISA {

FASTLORA_INLINE Pairs load_pairs(const float* p, int64_t n) {
  return narrow_pairs(load(p, n), n > kLanes ? load(p + kLanes, n - kLanes) : zero());
}

}  // namespace fastlora::FASTLORA_ISA

#endif
