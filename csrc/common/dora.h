// What crosses from the bindings to the kernels of DoRA, as in params.h. Norms, factors and their
// gradients are fp32.
#pragma once

#include "params.h"

namespace fastlora {

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

// kept = mask * x, rest = x - scale * mask * x: what dropout keeps, unscaled, and what is missing to x.
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

}  // namespace fastlora
