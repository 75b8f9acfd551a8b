// Cutting counts into parts, on the host and on the device alike.
#pragma once

#include "cuda/ptx.cuh"

namespace fastlora::cuda {

template <class Int>
FASTLORA_HOST_DEVICE Int smaller(Int a, Int b) {
  return a < b ? a : b;
}
template <class Int>
FASTLORA_HOST_DEVICE Int larger(Int a, Int b) {
  return a > b ? a : b;
}

FASTLORA_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where part i of `count` things that are cut into `parts` begins.
FASTLORA_HOST_DEVICE int part_start(int count, int i, int parts) {
  return static_cast<int>(int64_t{count} * i / parts);
}

}  // namespace fastlora::cuda
