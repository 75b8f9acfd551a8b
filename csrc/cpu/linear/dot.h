// Dot products of a few tokens with rows of W, for decode.h.
#pragma once

#include "../weight/transposed.h"
#include "microkernel.h"

namespace fastlora::FASTLORA_ISA {

// x for dot products with rows of a source, and the dot products themselves:
//   pack(x, K, m, M, out)   token m of M into `out`, which has room for M * size(K) units
//   dot<R, M>(...)          acc[i][m] += lanes of W[n + i] . x[m], for R rows and M tokens
// acc must be multiplied with `factor()` at the end.
template <class Compute, class Source>
struct Dot;

// What most of them have in common: x as rows of units, padded to a multiple of kStep elements.
template <class Compute, int64_t kStep>
struct RowsOfX {
  using Unit = typename Compute::Unit;
  template <class Source>
  static bool serves(const Source&) {
    return true;
  }
  static int64_t size(int64_t K) { return round_up(K, kStep) / Compute::kPerUnit; }
  static float factor() { return 1.0f; }

  template <class X>
  static void pack(const X* x, int64_t K, int m, int, Unit* out) {
    pack_rows(Compute{}, Block<X>{x, K, 1, K}, round_up(K, kStep), out + m * size(K), 0);
  }
};

template <class T>
struct Dot<F32, Dense<T>> : RowsOfX<F32, kLanes> {
  static constexpr int kRows = 2;
  template <int R, int M>
  static void dot(const Dense<T>& w, const float*, int64_t n, const float* x, Vec (&acc)[R][M]) {
    for (int64_t k = 0; k < w.K; k += kLanes) {
      for (int i = 0; i < R; i++) {
        const T* row = w.data + (n + i) * w.K + k;
        const Vec v = load(row, w.K - k);
        for (int m = 0; m < M; m++) acc[i][m] = fma(v, load(x + m * size(w.K) + k), acc[i][m]);
      }
    }
  }
};

template <>
struct Dot<F32, FourBit> : RowsOfX<F32, kGroup> {
  static constexpr int kRows = 1;
  template <int R, int M>
  static void dot(const FourBit& w, const float*, int64_t n, const float* x, Vec (&acc)[R][M]) {
    const int64_t ld = size(w.K);
    for (int i = 0; i < R; i++) {
      decode(w, (n + i) * w.K, w.K, [&](int64_t k, Vec v) __attribute__((always_inline)) {
        for (int m = 0; m < M; m++) acc[i][m] = fma(v, load(x + m * ld + k), acc[i][m]);
      });
    }
  }
};

#if defined(FASTLORA_PAIRS)

template <>
struct Dot<Bf16Pair, Dense<bf16>> : RowsOfX<Bf16Pair, 2 * kLanes> {
  static constexpr int kRows = 4;
  template <int R, int M>
  static void dot(const Dense<bf16>& w, const float*, int64_t n, const uint32_t* x,
                  Vec (&acc)[R][M]) {
    constexpr int64_t kAhead = 4096;  // elements; the next rows reach L2 in time
    const int64_t ld = size(w.K);
    for (int64_t k = 0; k < w.K; k += 2 * kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) {
        const bf16* row = w.data + (n + i) * w.K + k;
        prefetch(row + kAhead);
        const Pairs v = w.K - k >= 2 * kLanes ? load_pairs(reinterpret_cast<const uint32_t*>(row))
                                              : load_pairs(row, w.K - k);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          acc[i][m] = dot_pairs(v, load_pairs(x + m * ld + k / 2), acc[i][m]);
        }
      }
    }
  }
};

#endif

#if defined(FASTLORA_PAIRS) && !defined(__AVX512BF16__)

template <>
struct Dot<Bf16Pair, FourBit> : RowsOfX<Bf16Pair, kGroup> {
  static constexpr int kRows = 1;
  template <int R, int M>
  static void dot(const FourBit& w, const float*, int64_t n, const uint32_t* x, Vec (&acc)[R][M]) {
    constexpr int64_t kAhead = 4096;  // bytes
    const int64_t ld = size(w.K);
    for (int i = 0; i < R; i++) {
      decode_bf16(w, (n + i) * w.K, w.K, kAhead,
                  [&](int64_t k, Pairs v) __attribute__((always_inline)) {
                    for (int m = 0; m < M; m++) {
                      acc[i][m] = dot_pairs(v, load_pairs(x + m * ld + k / 2), acc[i][m]);
                    }
                  });
    }
  }
};

#endif

template <class Compute, class T>
struct Dot<Compute, Transposed<T>> : RowsOfX<Compute, 2 * kLanes> {
  using typename RowsOfX<Compute, 2 * kLanes>::Unit;
  using RowsOfX<Compute, 2 * kLanes>::size;
  static constexpr int64_t kUnits = 128;  // of a panel
  // C[m][kPanel] = x[m] . W for rows [n, n + count) of W, at most kPanel; `panel` has kUnits units.
  static void columns(const Transposed<T>& w, int64_t n, int64_t count, int M, const Unit* x,
                      Unit* panel, float* C) {
    constexpr int64_t kStep = kUnits * Compute::kPerUnit;
    const int mv = static_cast<int>(ceil_div(count, kLanes));
    for (int64_t k = 0; k < w.K; k += kStep) {
      const int64_t rows = min(kStep, w.K - k);
      weight_panels(Compute{}, Dense<T>{w.data, w.N}, k, rows, n, count, Panels<Unit>{panel, 0});
      multiply<Compute>({.mv = mv,
                         .nr = M,
                         .units = ceil_div(rows, Compute::kPerUnit),
                         .rows = {x + k / Compute::kPerUnit, size(w.K)},
                         .panel = {panel, kPanel},
                         .C = {C, kPanel, k > 0}});
    }
  }
};

}  // namespace fastlora::FASTLORA_ISA

#if defined(__AVX512BF16__)
#include "dot_avx512_bf16.h"
#endif
