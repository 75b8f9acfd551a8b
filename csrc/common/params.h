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

constexpr int64_t kNestedBlock = 256;  // absmax of the absmax: bitsandbytes' fixed blocksize

// A 4-bit weight in bitsandbytes' layout: codes along the flattened [N, K] weight, two a byte, high
// nibble first; blocks of `blocksize` codes share one absmax.
struct Quant4bit {
  const uint8_t* packed;       // [ceil(N K / 2)]
  const float* code;           // [16]
  int64_t blocksize;           // a power of two, at least 32
  const float* absmax;         // [blocks], or null when nested
  const uint8_t* absmax_8bit;  // [blocks], nested: absmax = nested_code[q] * nested_absmax + offset
  const float* nested_code;    // [256]
  const float* nested_absmax;  // [ceil(blocks / kNestedBlock)]
  const float* nested_offset;  // [1]
};

struct Weight {
  int64_t N, K;
  const void* dense;  // [N, K] in compute_dtype, or null: then `quant` holds it
  bool transposed;    // dense is stored [K, N]
  Quant4bit quant;
  DType compute_dtype;  // dtype of the base product's operands
};

// How much the kernels work on at a time; limits and choice in cpu/runtime/tile_sizes.h.
struct TileSizes {
  // Decoding, one pass over the rows of W.
  int64_t decode_tokens;  // up to this many tokens
  int64_t decode_rows;    // rows of W in one tile
  // Forward.
  int64_t fwd_pack_bytes;      // of packed x: what stays in a shared cache
  int64_t fwd_shrink_columns;  // of x, widened at a time for S
  int64_t fwd_strip_rows;      // rows of W of a tile when there are many tokens
  int64_t fwd_strip_bytes;     // of one row of a strip: strip and panel fit in L2
  int64_t fwd_few_rows;        // strip rows for one panel of tokens; 0: the register tile's height
  // Backward.
  int64_t bwd_token_block;     // tokens of one tile of dS
  int64_t bwd_shrink_columns;  // of dy, widened at a time for dS
  int64_t bwd_strip_columns;   // of K or N in one tile: whole blocks of keep bits
  int64_t bwd_tokens;          // whose fp32 tile of dx stays in L2
  int64_t bwd_panel_units;     // of N decoded at a time
  int64_t bwd_few_tokens;      // up to here reading W costs more than using it
  int64_t bwd_grad_tokens;     // tokens of one fp32 panel of x or dy
};

// y = x W^T + bias + scaling * S B^T,  S = drop(x) A^T
struct LoraLinearFwd {
  int64_t M, R;
  TileSizes tiles;
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
  int64_t first_row;  // for the dropout: m of x's row 0, where x is a part of a larger batch
  void* y;            // [M, N]
  float* S;           // [M, R]
};

// dS = scaling * dy B, dx = dy W + drop'(dS A), dA = dS^T drop(x), dB = scaling * dy^T S,
// dbias = sum over m of dy. A null output is not computed.
struct LoraLinearBwd {
  int64_t M, R;
  TileSizes tiles;
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
  int64_t first_row;  // for the dropout: m of x's row 0, where x is a part of a larger batch
  void* dx;           // [M, K]
  float* dA;          // [R, K]
  float* dB;          // [N, R]
  float* dbias;       // [N]
};

// y[m] = weight_scale * E[id] + scaling * S[m] B^T,  S[m] = A[:, id],  id = ids[m]
struct LoraEmbeddingFwd {
  int64_t M, N, R;
  int64_t V;            // rows of the table
  DType dtype;          // of E and y
  DType adapter_dtype;  // of A and B
  const int64_t* ids;   // [M], 0 <= id < V
  const void* weight;   // E [V, N]
  const void* lora_A;   // [R, V]
  const void* lora_B;   // [N, R]
  float weight_scale;
  float scaling;
  void* y;  // [M, N]
};

// dS = scaling * dy B, dA[:, v] = sum over m with ids[m] = v of dS[m], dB = scaling * dy^T S.
// A null output is not computed.
struct LoraEmbeddingBwd {
  int64_t M, N, R, V;
  DType dtype;  // of dy
  DType adapter_dtype;
  const void* dy;  // [M, N], row stride lddy
  int64_t lddy;
  const int64_t* ids;
  const void* lora_A;
  const void* lora_B;
  float scaling;
  int64_t padding_idx;  // the id that adds nothing to dA, or -1
  float* dA;            // [R, V]
  float* dB;            // [N, R]
};

// DoRA. Norms, factors and their gradients are fp32.
//
// norms[n] = |W[n] + scaling * (B A)[n]|
struct DoraNorm {
  int64_t R;
  Weight weight;
  DType adapter_dtype;
  const void* lora_A;  // [R, K]
  const void* lora_B;  // [N, R]
  float scaling;
  float* norms;  // [N]
};

// y = factor * z + rest
struct DoraMagnitudeFwd {
  int64_t M, N;
  DType dtype;       // of z and y
  DType rest_dtype;  // of rest
  const void* z;     // [M, N], row stride ldz
  int64_t ldz;
  const float* factor;  // [N]
  const void* rest;     // [M, N], row stride ldrest; null: none
  int64_t ldrest;       // 0: one row for all
  void* y;              // [M, N]
};

// dz = factor * dy, dfactor = sum over m of dy * z, drest = sum over m of dy. A null output is not
// computed.
struct DoraMagnitudeBwd {
  int64_t M, N;
  DType dtype;     // of dy, z and dz
  const void* dy;  // [M, N], row stride lddy
  int64_t lddy;
  const void* z;  // [M, N], row stride ldz
  int64_t ldz;
  const float* factor;  // [N]
  void* dz;             // [M, N]
  float* dfactor;       // [N]
  float* drest;         // [N]
};

// kept = mask * x, rest = x - scale * mask * x: what dropout keeps, unscaled, and the rest of x.
struct DoraDropoutFwd {
  int64_t M, K;
  DType dtype;
  const void* x;  // [M, K], row stride ldx
  int64_t ldx;
  Dropout dropout;
  void* kept;  // [M, K]
  void* rest;  // [M, K]
};

// dx = mask * dkept + (1 - scale * mask) * drest
struct DoraDropoutBwd {
  int64_t M, K;
  DType dtype;
  const void* dkept;  // [M, K], row stride lddkept
  int64_t lddkept;
  const void* drest;  // [M, K], row stride lddrest
  int64_t lddrest;
  Dropout dropout;
  void* dx;  // [M, K]
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
// has, and returns when all are done. Kernels are handed one; they never start threads. A thread gets
// up to `neighbours` tiles that follow each other at a time: what one prefetches is the next one's.
struct ParallelFor {
  void (*run)(int64_t tiles, int64_t neighbours,
              void (*body)(const void* context, int64_t begin, int64_t end), const void* context);

  // The same with f(begin, end). Always inlined: it belongs to no instruction set.
  template <class F>
  inline __attribute__((always_inline)) void each_run(int64_t tiles, int64_t neighbours,
                                                      const F& f) const {
    run(
        tiles, neighbours,
        [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); },
        &f);
  }
};

// One layer, or `count` that read one x: with the same M, K, x, tiles and dtypes, all dense or all
// 4-bit. The layers of a backward have one dx, the sum of what each adds to it.
template <class Params>
struct LayersOf {
  const Params* data;
  int64_t count;
};

// Every CPU kernel: its name, and what it takes. The tables, the declarations and the program for the
// tests are made from this list, and so is CMake's list of kernels/<name>.cpp.
#define FASTLORA_KERNELS(KERNEL)                   \
  KERNEL(lora_linear_fwd, LayersOf<LoraLinearFwd>) \
  KERNEL(lora_linear_bwd, LayersOf<LoraLinearBwd>) \
  KERNEL(lora_embedding_fwd, LoraEmbeddingFwd)     \
  KERNEL(lora_embedding_bwd, LoraEmbeddingBwd)     \
  KERNEL(quantize_4bit, Quantize4bit)              \
  KERNEL(dequantize_4bit, Dequantize4bit)          \
  KERNEL(dora_norm, DoraNorm)                      \
  KERNEL(dora_magnitude_fwd, DoraMagnitudeFwd)     \
  KERNEL(dora_magnitude_bwd, DoraMagnitudeBwd)     \
  KERNEL(dora_dropout_fwd, DoraDropoutFwd)         \
  KERNEL(dora_dropout_bwd, DoraDropoutBwd)

}  // namespace fastlora
