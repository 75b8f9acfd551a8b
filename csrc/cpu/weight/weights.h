// The frozen weight as operands of the tile product, a strip at a time: rows for the forward, panels
// of columns for the backward. Dense weights are copied or widened, 4-bit ones are decoded. No copy is
// larger than a strip.
#pragma once

#include "absmax.h"
#include "decode4.h"
#include "pack.h"

namespace fastlora::FASTLORA_ISA {

template <class T>
struct Dense {
  const T* data;  // [N, K]
  int64_t K;
};

// Stored [K, N]; see transposed.h.
template <class T>
struct Transposed {
  const T* data;
  int64_t N, K;
};
template <class Source>
constexpr bool kStoredByRows = true;
template <class T>
constexpr bool kStoredByRows<Transposed<T>> = false;

// A weight as the kernels read it, and the look-up tables of its absmax.
//   absmax   of a 4-bit weight in fp32, or null: nested statistics are then decoded row by row
template <class Source>
struct Operand;
template <class T>
struct Operand<Dense<T>> {
  Dense<T> source;
  Operand(const Weight& weight, const float*)
      : source{static_cast<const T*>(weight.dense), weight.K} {}
};
template <class T>
struct Operand<Transposed<T>> {
  Transposed<T> source;
  Operand(const Weight& weight, const float*)
      : source{static_cast<const T*>(weight.dense), weight.N, weight.K} {}
};
template <>
struct Operand<FourBit> {
  Statistics statistics;
  FourBit source;
  Operand(const Weight& weight, const float* absmax)
      : statistics(statistics_of(weight.quant)), source{weight.quant.packed,
                                                        weight.quant.code,
                                                        absmax,
                                                        weight.K,
                                                        log2_of(weight.quant.blocksize),
                                                        weight.compute_dtype,
                                                        &statistics} {}
  Operand(const Operand&) = delete;  // source points into it
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

// out[row][ld] = W[n + row][k + ...], for `count` columns, zero up to the next multiple of kGroup.
template <class Compute, class T>
static void weight_rows(Compute compute, const Dense<T>& w, int64_t n, int64_t rows, int64_t k,
                        int64_t count, typename Compute::Unit* out, int64_t ld) {
  const Block<T> block{w.data + n * w.K + k, w.K, rows, count};
  pack_rows(compute, block, round_up(count, kGroup), out, ld);
}

// ---- F32: one float a unit ---------------------------------------------------------------------

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
    pack_columns(block, out.data + c / kPanel * out.stride);
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

#if defined(FASTLORA_PAIRS)

[[maybe_unused]] static void weight_rows(Bf16Pair, const FourBit& w, int64_t n, int64_t rows,
                                         int64_t k, int64_t count, uint32_t* out, int64_t ld) {
  for (int64_t i = 0; i < rows; i++) {
    uint32_t* row = out + i * ld;
    decode_bf16(w, (n + i) * w.K + k, count, rows * w.K / 2,  // the next strip's row
                [&](int64_t j, Pairs v)
                    __attribute__((always_inline)) { store_pairs(row + j / 2, v); });
  }
}

[[maybe_unused]] static void weight_panels(Bf16Pair, const Dense<bf16>& w, int64_t n, int64_t rows,
                                           int64_t k, int64_t count, Panels<uint32_t> out) {
  for (int64_t i = 0; i < rows; i += 2) {
    const bf16* a = w.data + (n + i) * w.K + k;
    for (int64_t c = 0; c < count; c += 2 * kLanes) {
      prefetch(a + c + rows * w.K);  // the next panel's rows
      prefetch(a + c + (rows + 1) * w.K);
      const Pairs low = load_pairs(a + c, count - c);
      const Pairs high = i + 1 < rows ? load_pairs(a + w.K + c, count - c) : zero_pairs();
      interleave(low, high, Panels<uint32_t>::at(out, i / 2, c));
    }
  }
}

#if defined(__AVX512BF16__)

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
      interleave(load_pairs(low, kGroup), load_pairs(high, kGroup),
                 Panels<uint32_t>::at(out, i / 2, c));
    }
  }
}

#else

// Two rows are decoded as rows, a part of them at a time, and then interleaved.
[[maybe_unused]] static void weight_panels(Bf16Pair, const FourBit& w, int64_t n, int64_t rows,
                                           int64_t k, int64_t count, Panels<uint32_t> out) {
  constexpr int64_t kPart = 256;
  for (int64_t i = 0; i < rows; i += 2) {
    for (int64_t c = 0; c < count; c += kPart) {
      const int64_t begin = (n + i) * w.K + k + c, part = min(kPart, count - c);
      uint32_t pairs[2][kPart / 2] = {};
      for (int64_t row = 0; row < min(2, rows - i); row++) {
        decode_bf16(w, begin + row * w.K, part, rows * w.K / 2,
                    [&](int64_t j, Pairs v)
                        __attribute__((always_inline)) { store_pairs(pairs[row] + j / 2, v); });
      }
      for (int64_t j = 0; j < part; j += 2 * kLanes) {
        interleave(load_pairs(pairs[0] + j / 2), load_pairs(pairs[1] + j / 2),
                   Panels<uint32_t>::at(out, i / 2, c + j));
      }
    }
  }
}

#endif

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
template <class Source>
FASTLORA_INLINE const Source& with_absmax(const Source& w, int64_t, int64_t, float*) {
  return w;
}

FASTLORA_INLINE int64_t absmax_count(const FourBit& w, int64_t rows) {
  return w.absmax ? 0 : ((rows * w.K) >> w.shift) + 2;  // a row may begin and end within a block
}
template <class Source>
FASTLORA_INLINE int64_t absmax_count(const Source&, int64_t) {
  return 0;
}

}  // namespace fastlora::FASTLORA_ISA
