// csrc/bindings/cuda_stream.h for emulated kernels, which run in place.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cuda/kernels.h"

namespace fastlora {

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor&) {}
  cuda::Stream stream() const { return nullptr; }
};

}  // namespace fastlora
