// The second stage of a product whose sum was cut into parts: adds them in a fixed order.
#pragma once

#include "cuda/kernels.h"

namespace fastlora::cuda {

// y = sum of partial + factor * S B^T + bias, rounded once; S = sum of S_partial.
struct FinishParams {
  int64_t M, outputs, splits;
  const float* partial;  // [splits, M, outputs]
  DType bias_dtype;
  const void* bias;  // [outputs] or null
  DType y_dtype;
  void* y;  // [M, outputs]
  // Without a LoRA term R is 0.
  int64_t R, S_splits;
  const float* S_partial;  // [S_splits, M, R]
  float* S;                // [M, R], written
  float factor;
  DType adapter_dtype;
  const void* adapter;  // [outputs, R]
};

const char* finish(const FinishParams& p, Stream stream);

}  // namespace fastlora::cuda
