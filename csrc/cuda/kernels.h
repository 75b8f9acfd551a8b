// The CUDA kernels as the bindings see them. Each call enqueues its work on `stream` of the current
// device and returns null, or CUDA's own words when that fails. Pointers are to device memory.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace fastlora::cuda {

using Stream = void*;  // a cudaStream_t

// Rows of a kernel's 16-byte loads: x and dy must start at multiples of 16 bytes, and so must each
// of their rows.
constexpr int64_t kRowAlignment = 16;

// The products of a 4-bit layer, LoRA terms included; one struct for both directions:
//   forward    y  = x W^T  + bias + factor * S B^T      x [M, K], y [M, N], adapter B [N, R]
//   dx         y  = x W    + drop'(factor * S A)        x = dy [M, N], y = dx [M, K], S = dS,
//                                                       adapter A [R, K]
struct QloraGemm {
  int64_t M, R;
  Weight weight;  // compute_dtype bf16 or fp16, that of x
  const void* x;  // rows of stride ldx
  int64_t ldx;
  const float* S;  // [M, R]
  float factor;
  DType adapter_dtype;
  const void* adapter;
  DType bias_dtype;
  const void* bias;  // [N] or null
  Dropout dropout;   // of dx
  DType y_dtype;
  void* y;  // contiguous
};

// Makes a device the current one.
const char* set_device(int device);
// Null if these kernels run on a device, else CUDA's words; the current device stays.
const char* device_fault(int device);

constexpr int64_t kMostBlocksize = 4096;  // of quantize_4bit: a block of codes per block of threads
const char* quantize_4bit(const Quantize4bit& p, Stream stream);
const char* dequantize_4bit(const Dequantize4bit& p, Stream stream);

// The second quantisation, of absmax itself, to codes of 8 bits: reference.nested.
struct QuantizeAbsmax {
  int64_t blocks;
  const float* absmax;   // [blocks]
  const float* offset;   // [1], the mean of absmax
  const float* code;     // [256], ascending
  uint8_t* absmax_8bit;  // [blocks]
  float* nested_absmax;  // [ceil(blocks / kNestedBlock)]
};
const char* quantize_absmax(const QuantizeAbsmax& p, Stream stream);

// The floats of `workspace` are scratch memory, as many as the function beside says.
int64_t qlora_gemm_fwd_workspace(int64_t M, int64_t N, int64_t K);
const char* qlora_gemm_fwd(const QloraGemm& p, float* workspace, Stream stream);
int64_t qlora_gemm_dx_workspace(int64_t M, int64_t N, int64_t K);
const char* qlora_gemm_dx(const QloraGemm& p, float* workspace, Stream stream);

// y and S of LoraLinearFwd for up to kDecodeTokens tokens; blocksize and K are multiples of 64.
constexpr int64_t kDecodeTokens = 64;
int64_t qlora_decode_workspace(const LoraLinearFwd& p);
const char* qlora_decode(const LoraLinearFwd& p, float* workspace, Stream stream);

}  // namespace fastlora::cuda
