// A dense weight that is stored [K, N], as GPT-2's Conv1D has it, read as [N, K]: tiles are transposed in
// registers on the way into a strip.
#pragma once

#include "weights.h"

namespace fastlora::FASTLORA_ISA {

// out[j][out_ld] = in[i][j] for i < rows, j < count; past the rows zero, up to a multiple of kLanes.
template <class T>
static void copy_transposed(const T* in, int64_t ld, int64_t rows, int64_t count, float* out,
                            int64_t out_ld) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < count; j += kLanes) {
      Vec r[kLanes];
      for (int l = 0; l < kLanes; l++) {
        r[l] = i + l < rows ? load(in + (i + l) * ld + j, count - j) : zero();
      }
      transpose(r);
      for (int64_t l = 0; l < min(kLanes, count - j); l++) store(out + (j + l) * out_ld + i, r[l]);
    }
  }
}

template <class T>
static void weight_rows(F32, const Transposed<T>& w, int64_t n, int64_t rows, int64_t k,
                        int64_t count, float* out, int64_t ld) {
  copy_transposed(w.data + k * w.N + n, w.N, count, rows, out, ld);
}

template <class T>
static void weight_panels(F32, const Transposed<T>& w, int64_t n, int64_t rows, int64_t k,
                          int64_t count, Panels<float> out) {
  for (int64_t c = 0; c < count; c += kPanel) {
    copy_transposed(w.data + (k + c) * w.N + n, w.N, min(kPanel, count - c), rows,
                    out.data + c / kPanel * out.stride, kPanel);
  }
}

#if defined(FASTLORA_PAIRS)

// Rows k and k + 1 are zipped into pairs first.
[[maybe_unused]] static void weight_rows(Bf16Pair, const Transposed<bf16>& w, int64_t n,
                                         int64_t rows, int64_t k, int64_t count, uint32_t* out,
                                         int64_t ld) {
  const bf16* in = w.data + k * w.N + n;
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    for (int64_t j = 0; j < rows; j += 2 * kLanes) {
      uint32_t zipped[kLanes][2 * kLanes];
      for (int64_t l = 0; l < kLanes; l++) {
        const bf16* a = in + (i + 2 * l) * w.N + j;
        const Pairs low = i + 2 * l < count ? load_pairs(a, rows - j) : zero_pairs();
        const Pairs high = i + 2 * l + 1 < count ? load_pairs(a + w.N, rows - j) : zero_pairs();
        interleave(low, high, zipped[l]);
      }
      for (int64_t half = 0; half < 2 * kLanes; half += kLanes) {
        Pairs r[kLanes];
        for (int l = 0; l < kLanes; l++) r[l] = load_pairs(zipped[l] + half);
        transpose(r);
        for (int64_t l = 0; l < min(kLanes, rows - j - half); l++) {
          store_pairs(out + (j + half + l) * ld + i / 2, r[l]);
        }
      }
    }
  }
}

// Neighbours along N, the summed dimension of the backward, are pairs as they lie in memory.
[[maybe_unused]] static void weight_panels(Bf16Pair, const Transposed<bf16>& w, int64_t n,
                                           int64_t rows, int64_t k, int64_t count,
                                           Panels<uint32_t> out) {
  const int64_t units = ceil_div(rows, 2);
  for (int64_t c = 0; c < count; c += kLanes) {
    const bf16* in = w.data + (k + c) * w.N + n;
    for (int64_t j = 0; j < units; j += kLanes) {
      Pairs r[kLanes];
      for (int l = 0; l < kLanes; l++) {
        r[l] = c + l < count ? load_pairs(in + l * w.N + 2 * j, rows - 2 * j) : zero_pairs();
      }
      transpose(r);
      for (int64_t l = 0; l < min(kLanes, units - j); l++) {
        store_pairs(Panels<uint32_t>::at(out, j + l, c), r[l]);
      }
    }
  }
}

#endif

}  // namespace fastlora::FASTLORA_ISA
