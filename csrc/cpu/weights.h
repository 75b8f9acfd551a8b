// The frozen weight as operands of the tile product, a strip at a time: rows for the forward, panels
// of columns for the backward. Dense weights are copied or widened, 4-bit ones decoded; nothing larger
// than a strip ever exists.
#pragma once

#include "absmax.h"
#include "decode4.h"
#include "pack.h"

namespace fastlora {
namespace FASTLORA_ISA {

template <class T>
struct Dense {
  const T* data;  // [N, K]
  int64_t K;
};

// Where a panel of columns goes: `panels` of kPanel columns, [unit][kPanel] each.
template <class Unit>
struct Panels {
  Unit* data;
  int64_t stride;  // from one panel to the next
  FASTLORA_INLINE Unit* at(const Panels& p, int64_t unit, int64_t column) {
    return p.data + column / kPanel * p.stride + unit * kPanel + column % kPanel;
  }
};

// ---- F32: one float a unit ---------------------------------------------------------------------

// out[row][ld] = W[n + row][k + ...], for `count` columns, zero up to the next multiple of kGroup.
template <class T>
static void weight_rows(F32 compute, const Dense<T>& w, int64_t n, int64_t rows, int64_t k,
                        int64_t count, float* out, int64_t ld) {
  const Block<T> block{w.data + n * w.K + k, w.K, rows, count};
  pack_rows(compute, block, round_up(count, kGroup), out, ld);
}
[[maybe_unused]] static void weight_rows(F32, const FourBit& w, int64_t n, int64_t rows, int64_t k,
                                         int64_t count, float* out, int64_t ld) {
  for (int64_t i = 0; i < rows; i++) {
    float* row = out + i * ld;
    decode(w, (n + i) * w.K + k, count,
           [&](int64_t j, Vec v) __attribute__((always_inline)) { store(row + j, v); });
  }
}

// Panels of columns [k, k + count) of rows [n, n + rows).
template <class T>
static void weight_panels(F32, const Dense<T>& w, int64_t n, int64_t rows, int64_t k, int64_t count,
                          Panels<float> out) {
  for (int64_t c = 0; c < count; c += kPanel) {
    const Block<T> block{w.data + n * w.K + k + c, w.K, rows, min(kPanel, count - c)};
    pack_columns(block, KeepRows{nullptr, 0}, 0, out.data + c / kPanel * out.stride);
  }
}
[[maybe_unused]] static void weight_panels(F32, const FourBit& w, int64_t n, int64_t rows,
                                           int64_t k, int64_t count, Panels<float> out) {
  for (int64_t i = 0; i < rows; i++) {
    decode(w, (n + i) * w.K + k, count, [&](int64_t j, Vec v) __attribute__((always_inline)) {
      store(Panels<float>::at(out, i, j), v);
    });
  }
}

// ---- Bf16Pair: two neighbours of the summed dimension a unit -----------------------------------

#if defined(__AVX512BF16__)

[[maybe_unused]] static void weight_rows(Bf16Pair compute, const Dense<bf16>& w, int64_t n,
                                         int64_t rows, int64_t k, int64_t count, uint32_t* out,
                                         int64_t ld) {
  const Block<bf16> block{w.data + n * w.K + k, w.K, rows, count};
  pack_rows(compute, block, round_up(count, kGroup), out, ld);
}
[[maybe_unused]] static void weight_rows(Bf16Pair, const FourBit& w, int64_t n, int64_t rows,
                                         int64_t k, int64_t count, uint32_t* out, int64_t ld) {
  for (int64_t i = 0; i < rows; i++) {
    uint32_t* row = out + i * ld;
    decode_bf16(w, (n + i) * w.K + k, count, rows * w.K / 2,  // the next strip's row
                [&](int64_t j, __m512i v)
                    __attribute__((always_inline)) { _mm512_storeu_si512(row + j / 2, v); });
  }
}

// 32 columns of rows a and b as pairs (a, b) in two vectors.
FASTLORA_INLINE void interleave(__m512i a, __m512i b, uint32_t* out) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi16(a, high, b));
}

[[maybe_unused]] static void weight_panels(Bf16Pair, const Dense<bf16>& w, int64_t n, int64_t rows,
                                           int64_t k, int64_t count, Panels<uint32_t> out) {
  for (int64_t i = 0; i < rows; i += 2) {
    const bf16* a = w.data + (n + i) * w.K + k;
    for (int64_t c = 0; c < count; c += kGroup) {
      prefetch(a + c + rows * w.K);  // the next panel's rows
      prefetch(a + c + (rows + 1) * w.K);
      const __m512i low = load_bf16x32(a + c, count - c);
      const __m512i high =
          i + 1 < rows ? load_bf16x32(a + w.K + c, count - c) : _mm512_setzero_si512();
      interleave(low, high, Panels<uint32_t>::at(out, i / 2, c));
    }
  }
}

[[maybe_unused]] static void weight_panels(Bf16Pair, const FourBit& w, int64_t n, int64_t rows,
                                           int64_t k, int64_t count, Panels<uint32_t> out) {
  const bool aligned = w.K % kGroup == 0 && k % kGroup == 0;
  for (int64_t i = 0; i < rows; i += 2) {
    const int64_t a = (n + i) * w.K + k, b = a + w.K;
    const bool pair = i + 1 < rows;
    int64_t c = 0;
    if (aligned && pair) {
      while (c + kGroup <= count) {
        const int64_t block_a = (a + c) >> w.shift, block_b = (b + c) >> w.shift;
        const int64_t end =
            min(min(((block_a + 1) << w.shift) - a, ((block_b + 1) << w.shift) - b), count);
        prefetch_once(w.packed + (a + c + rows * w.K) / 2, kGroup);  // the next panel's rows
        prefetch_once(w.packed + (b + c + rows * w.K) / 2, kGroup);
        const __m512i table = bf16_table(w.code, w.absmax[block_a], w.absmax[block_b]);
        for (; c + kGroup <= end; c += kGroup) {
          decode_pairs(w.packed + (a + c) / 2, w.packed + (b + c) / 2, table,
                       Panels<uint32_t>::at(out, i / 2, c));
        }
      }
    }
    for (; c < count; c += kGroup) {
      const int64_t n_values = min(kGroup, count - c);
      float low[kGroup] = {}, high[kGroup] = {};
      decode_any(w, a + c, n_values, low);
      if (pair) decode_any(w, b + c, n_values, high);
      interleave(load_bf16x32(low, kGroup), load_bf16x32(high, kGroup),
                 Panels<uint32_t>::at(out, i / 2, c));
    }
  }
}

#endif

// ---- absmax of some rows -------------------------------------------------------------------------

// w with absmax of rows [n, n + rows) in fp32: nested statistics are decoded into `memory`, which has
// room for absmax_count(w, rows) of them.
[[maybe_unused]] static FourBit with_absmax(const FourBit& w, int64_t n, int64_t rows,
                                            float* memory) {
  if (w.absmax != nullptr) return w;
  const int64_t begin = (n * w.K) >> w.shift, end = (((n + rows) * w.K - 1) >> w.shift) + 1;
  decode_absmax(*w.statistics, begin, end, memory);
  FourBit decoded = w;
  decoded.absmax = memory - begin;
  return decoded;
}
template <class T>
FASTLORA_INLINE const Dense<T>& with_absmax(const Dense<T>& w, int64_t, int64_t, float*) {
  return w;
}

FASTLORA_INLINE int64_t absmax_count(const FourBit& w, int64_t rows) {
  return w.absmax ? 0 : ((rows * w.K) >> w.shift) + 2;  // a row may begin and end within a block
}
template <class T>
FASTLORA_INLINE int64_t absmax_count(const Dense<T>&, int64_t) {
  return 0;
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
