// What crosses from the bindings to the kernels: plain structs of sizes and pointers.
//
// Sizes: M tokens, N out_features, K in_features, R rank. All matrices are row-major.
#pragma once

#include <cstdint>

namespace fastlora {

enum class DType : int32_t { f32, bf16, f16 };

// Dropout of x on the LoRA path; the map from (m, k) to random bits is in philox.h.
struct Dropout {
  uint32_t threshold;   // round(65536 p); 0: no dropout, 65536: all dropped
  float scale;          // 1 / (1 - threshold / 65536), 0 when all are dropped
  const uint32_t* key;  // [2], the seed's low and high half; null without dropout
};

// A 4-bit weight in bitsandbytes' layout: codes along the flattened [N, K] weight, two a byte, high
// nibble first; blocks of `blocksize` codes share one absmax.
struct Quant4bit {
  const uint8_t* packed;       // [ceil(N K / 2)]
  const float* code;           // [16]
  int64_t blocksize;           // a power of two, at least 32
  const float* absmax;         // [blocks], or null when nested
  const uint8_t* absmax_8bit;  // [blocks], nested: absmax = nested_code[q] * nested_absmax + offset
  const float* nested_code;    // [256]
  const float* nested_absmax;  // [ceil(blocks / 256)]
  const float* nested_offset;  // [1]
};

struct Weight {
  int64_t N, K;
  const void* dense;  // [N, K] in compute_dtype, or null: then `quant` holds it
  Quant4bit quant;
  DType compute_dtype;  // dtype of the base product's operands
};

// y = x W^T + bias + scaling * S B^T,  S = drop(x) A^T
struct LoraLinearFwd {
  int64_t M, R;
  Weight weight;
  DType x_dtype;        // of x and y
  DType adapter_dtype;  // of A and B
  DType bias_dtype;
  const void* x;  // [M, K], row stride ldx
  int64_t ldx;
  const void* bias;    // [N] or null
  const void* lora_A;  // [R, K]
  const void* lora_B;  // [N, R]
  float scaling;
  Dropout dropout;
  void* y;   // [M, N]
  float* S;  // [M, R]
};

// dS = scaling * dy B, dx = dy W + drop'(dS A), dA = dS^T drop(x), dB = scaling * dy^T S,
// dbias = sum over m of dy. A null output is not computed.
struct LoraLinearBwd {
  int64_t M, R;
  Weight weight;
  DType x_dtype;  // of x, dy and dx
  DType adapter_dtype;
  const void* dy;  // [M, N], row stride lddy
  int64_t lddy;
  const void* x;  // [M, K], row stride ldx
  int64_t ldx;
  const void* lora_A;
  const void* lora_B;
  const float* S;
  float scaling;
  Dropout dropout;
  void* dx;      // [M, K]
  float* dA;     // [R, K]
  float* dB;     // [N, R]
  float* dbias;  // [N]
};

// q = argmin over the code of |w / absmax - code|, packed; absmax = max of |w| over a block.
struct Quantize4bit {
  int64_t elements;
  int64_t blocksize;
  DType dtype;
  const void* weight;    // [elements]
  const float* bounds;   // [15], midpoints of the sorted code
  const uint8_t* order;  // [16], sorted position -> code
  uint8_t* packed;       // [ceil(elements / 2)]
  float* absmax;         // [blocks]
};

// out = code[q] * absmax, the product in fp32, rounded once.
struct Dequantize4bit {
  int64_t elements;
  Quant4bit quant;
  DType dtype;
  void* out;  // [elements]
};

// Runs body(context, begin, end) over [0, tiles), each tile once, on as many threads as the caller
// has, and returns when all are done. Kernels are handed one; they never start threads.
struct ParallelFor {
  void (*run)(int64_t tiles, void (*body)(const void* context, int64_t begin, int64_t end),
              const void* context);
};

}  // namespace fastlora
