// Finding the code nearest to a number: what quantize_4bit and quantize_absmax have in common.
#pragma once

#include "cuda/ptx.cuh"

namespace fastlora::cuda {

// NaN stays NaN.
FASTLORA_DEVICE float clamp(float x) {
  if (x < -1.0f) return -1.0f;
  return x > 1.0f ? 1.0f : x;
}

// How many of kBounds ascending numbers in shared memory lie below x, by bisection; all of them for
// NaN, which is not <= anything. kBounds + 1 is a power of two.
template <uint32_t kBounds>
FASTLORA_DEVICE uint32_t bounds_below(uint32_t bounds, float x) {
  uint32_t position = 0;
#pragma unroll
  for (uint32_t step = (kBounds + 1) / 2; step > 0; step /= 2) {
    const float bound = load_shared<float>(bounds + 4 * (position + step - 1));
    if (!(x <= bound)) position += step;
  }
  return position;
}

}  // namespace fastlora::cuda
