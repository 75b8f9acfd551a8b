// Forward for a handful of tokens (decoding), where reading W is all the work.
//
// Lanes run along K, each row of W is read once, in its own order, and multiplied with all tokens; a
// packed 4-bit row is never unpacked to memory. The LoRA term joins the lanes before they are summed.
// Where W is stored [K, N], lanes run along N, a panel of columns at a time.
#pragma once

#include "../runtime/scratch.h"
#include "../runtime/tiles.h"
#include "../weight/transposed.h"

namespace fastlora {
namespace FASTLORA_ISA {

// x for dot products with rows of a source, and the dot products themselves:
//   pack(x, K, m, M, out)   token m of M into `out`, which has room for M * size(K) units
//   dot<R, M>(...)          acc[i][m] += lanes of W[n + i] . x[m], for R rows and M tokens
// acc must be multiplied with `factor()` at the end.
template <class Compute, class Source>
struct Dot;

template <class T>
struct Dot<F32, Dense<T>> {
  using Unit = float;
  static constexpr int kRows = 2;
  static bool serves(const Dense<T>&) { return true; }
  static int64_t size(int64_t K) { return round_up(K, kLanes); }
  static float factor() { return 1.0f; }

  template <class X>
  static void pack(const X* x, int64_t K, int m, int, float* out) {
    out += m * size(K);
    for (int64_t k = 0; k < K; k += kLanes) store(out + k, load(x + k, K - k));
  }
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
struct Dot<F32, FourBit> {
  using Unit = float;
  static constexpr int kRows = 1;
  static bool serves(const FourBit&) { return true; }
  static int64_t size(int64_t K) { return round_up(K, kGroup); }
  static float factor() { return 1.0f; }

  template <class X>
  static void pack(const X* x, int64_t K, int m, int, float* out) {
    out += m * size(K);
    for (int64_t k = 0; k < size(K); k += kLanes) {
      store(out + k, k < K ? load(x + k, K - k) : zero());
    }
  }
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
struct Dot<Bf16Pair, Dense<bf16>> {
  using Unit = uint32_t;
  static constexpr int kRows = 4;
  static bool serves(const Dense<bf16>&) { return true; }
  static int64_t size(int64_t K) { return round_up(K, 2 * kLanes) / 2; }
  static float factor() { return 1.0f; }

  template <class X>
  static void pack(const X* x, int64_t K, int m, int, uint32_t* out) {
    out += m * size(K);
    for (int64_t k = 0; k < K; k += 2 * kLanes) store_pairs(out + k / 2, load_pairs(x + k, K - k));
  }
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

#if defined(__AVX512BF16__)

// 64 bytes hold 128 codes. As 16-bit words, shifted by 0, 4, 8 and 12, they index a table that stands
// twice in its 32 entries, so that the bits above a nibble do not matter and nothing is unpacked: x
// is permuted to this order instead, once. Words 0-15 belong to one block of 64, 16-31 to the next.
//
// The table is not scaled by absmax; absmax multiplies the fp32 sum of each 64 products.
template <>
struct Dot<Bf16Pair, FourBit> {
  using Unit = uint32_t;
  static constexpr int kRows = 4;
  static constexpr int64_t kChunk = 128;
  static constexpr bool kScalesSums = true;
  // The sixteen NF4 codes times this lose half as much to bf16 as they do times 1, and less than codes
  // that are scaled before they are rounded.
  static constexpr float kTableFactor = 1.437005f;

  // Scales must be constant over 64 codes, and rows start at one.
  static bool serves(const FourBit& w) { return w.K % 64 == 0 && w.shift >= 6; }
  static int64_t size(int64_t K) { return round_up(K, kChunk) / 2; }
  static float factor() { return 1.0f / kTableFactor; }

  // Of token m among M: vector q of chunk c goes to out[((4 c + q) M + m) * 16], for all tokens.
  template <class X>
  static void pack(const X* x, int64_t K, int m, int M, uint32_t* out) {
    const __m512i step =
        _mm512_setr_epi32(0x00040000, 0x000c0008, 0x00140010, 0x001c0018, 0x00240020, 0x002c0028,
                          0x00340030, 0x003c0038, 0x00040000, 0x000c0008, 0x00140010, 0x001c0018,
                          0x00240020, 0x002c0028, 0x00340030, 0x003c0038);
    constexpr short kElement[4] = {1, 0, 3, 2};  // of each four, by shift: high nibble first
    for (int64_t c = 0; c * kChunk < K; c++) {
      __m512i part[4];
      for (int i = 0; i < 4; i++) {
        const int64_t k = c * kChunk + 32 * i;
        part[i] = k < K ? load_pairs(x + k, K - k) : _mm512_setzero_si512();
      }
      for (int q = 0; q < 4; q++) {
        const __m512i index = _mm512_add_epi16(step, _mm512_set1_epi16(kElement[q]));
        const __m512i low = _mm512_permutex2var_epi16(part[0], index, part[1]);
        const __m512i high = _mm512_permutex2var_epi16(part[2], index, part[3]);
        _mm512_storeu_si512(out + ((4 * c + q) * M + m) * kLanes,
                            _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
      }
    }
  }

  // scales: absmax of each 64 codes, K / 64 a row, from row n on.
  template <int R, int M>
  static void dot(const FourBit& w, const float* scales, int64_t n, const uint32_t* x,
                  Vec (&acc)[R][M]) {
    constexpr int64_t kAhead = 8192;  // bytes
    const int64_t groups = w.K / 64, row_bytes = w.K / 2, chunks = w.K / kChunk;
    const __m512i table = _mm512_broadcast_i64x4(
        (__m256i)_mm512_cvtneps_pbh(mul(load(w.code), broadcast(kTableFactor))));
    const uint8_t* rows = w.packed + n * row_bytes;
    const auto step = [&](int64_t c, bool half) __attribute__((always_inline)) {
      const uint32_t* x_chunk = x + c * 4 * M * kLanes;
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) {
        const uint8_t* q = rows + i * row_bytes + c * 64;
        prefetch(q + kAhead);
        const __m512i codes = half ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)q))
                                   : _mm512_loadu_si512(q);
        const float* s = scales + i * groups + 2 * c;
        const Vec scale = half ? _mm512_maskz_mov_ps(0x00ff, broadcast(s[0]))
                               : _mm512_mask_mov_ps(broadcast(s[0]), 0xff00, broadcast(s[1]));
        Vec products[M];
#pragma GCC unroll 4
        for (int shift = 0; shift < 4; shift++) {
          const __m512bh v = (__m512bh)_mm512_permutexvar_epi16(
              shift ? _mm512_srli_epi16(codes, 4 * shift) : codes, table);
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            const __m512bh xv = (__m512bh)_mm512_loadu_si512(x_chunk + (shift * M + m) * kLanes);
            products[m] = _mm512_dpbf16_ps(shift ? products[m] : zero(), v, xv);
          }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) acc[i][m] = fma(products[m], scale, acc[i][m]);
      }
    };
    for (int64_t c = 0; c < chunks; c++) step(c, false);
    if (w.K % kChunk) step(chunks, true);
  }
};

#elif defined(FASTLORA_PAIRS)

template <>
struct Dot<Bf16Pair, FourBit> {
  using Unit = uint32_t;
  static constexpr int kRows = 1;
  static bool serves(const FourBit&) { return true; }
  static int64_t size(int64_t K) { return round_up(K, kGroup) / 2; }
  static float factor() { return 1.0f; }

  template <class X>
  static void pack(const X* x, int64_t K, int m, int, uint32_t* out) {
    out += m * size(K);
    for (int64_t k = 0; k < 2 * size(K); k += 2 * kLanes) {
      store_pairs(out + k / 2, k < K ? load_pairs(x + k, K - k) : zero_pairs());
    }
  }
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
struct Dot<Compute, Transposed<T>> {
  using Unit = typename Compute::Unit;
  static constexpr int64_t kUnits = 128;  // of a panel
  static bool serves(const Transposed<T>&) { return true; }
  static int64_t size(int64_t K) { return round_up(K, 2 * kLanes) / Compute::kPerUnit; }
  static float factor() { return 1.0f; }

  template <class X>
  static void pack(const X* x, int64_t K, int m, int, Unit* out) {
    pack_rows(Compute{}, Block<X>{x, K, 1, K}, round_up(K, 2 * kLanes), out + m * size(K), 0);
  }
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

template <class Compute, class X, class Source>
class LinearDecode {
  using Rows = Dot<Compute, Source>;
  using Unit = typename Rows::Unit;

  // Tiles in a run for one thread: at the end of each run W's rows are prefetched for another core.
  static constexpr int64_t kNeighbours = 8;

  const LoraLinearFwd& p_;
  const TileSizes& tiles_;
  const Source& w_;
  const ParallelFor& parallel_;
  const int64_t N_, K_, R_, R_lanes_, K_lanes_;
  const int M_;

  struct Memory {
    Unit* x;        // as Rows::pack writes it
    float* x_kept;  // [M][K_lanes] in fp32, dropped elements zero, for S
    float* S;       // [M][R_lanes], scaled
  } memory_;

 public:
  LinearDecode(const LoraLinearFwd& p, const Source& w, const ParallelFor& parallel)
      : p_(p),
        tiles_(p.tiles),
        w_(w),
        parallel_(parallel),
        N_(p.weight.N),
        K_(p.weight.K),
        R_(p.R),
        R_lanes_(round_up(R_, kLanes)),
        K_lanes_(round_up(K_, kLanes)),
        M_(static_cast<int>(p.M)) {}

  static bool serves(const LoraLinearFwd& p, const Source& w) {
    return p.M <= p.tiles.decode_tokens && Rows::serves(w);
  }
  void run() {
    memory_ = on_scratch(Scratch::shared, [&](Pieces& pieces) {
      return Memory{pieces.take<Unit>(M_ * Rows::size(K_)), pieces.take<float>(M_ * K_lanes_),
                    pieces.take<float>(M_ * R_lanes_)};
    });
    const X* x = static_cast<const X*>(p_.x);
    for (int m = 0; m < M_; m++) Rows::pack(x + m * p_.ldx, K_, m, M_, memory_.x);
    if (R_ > 0) {
      widen(x);
      each(R_lanes_, &LinearDecode::shrink);
    }
    if constexpr (kStoredByRows<Source>) {
      each(ceil_div(N_, tiles_.decode_rows), &LinearDecode::product, kNeighbours);
    } else {
      each(ceil_div(N_, kPanel), &LinearDecode::columns);
    }
  }

 private:
  void each(int64_t tiles, void (LinearDecode::*stage)(int64_t tile), int64_t neighbours = 1) {
    for_each_tile(parallel_, this, stage, tiles, neighbours);
  }

  void widen(const X* x) {
    for (int m = 0; m < M_; m++) {
      uint32_t bits[kKeepWords];
      for (int64_t k = 0; k < K_; k += kLanes) {
        Vec v = load(x + m * p_.ldx + k, K_ - k);
        if (p_.dropout.threshold != 0) {
          if (k % kDropoutBlock == 0)
            keep_bits(p_.first_row + m, k / kDropoutBlock, p_.dropout, bits);
          v = keep(v, lane_bits(bits, k % kDropoutBlock));
        }
        store(memory_.x_kept + m * K_lanes_ + k, v);
      }
    }
  }

  // One column of S, for all tokens.
  void shrink(int64_t r) {
    if (r >= R_) {
      for (int m = 0; m < M_; m++) memory_.S[m * R_lanes_ + r] = 0;
      return;
    }
    with_type(p_.adapter_dtype, [&](auto* type) {
      const auto* A = static_cast<decltype(type)>(p_.lora_A) + r * K_;
      for (int m = 0; m < M_; m++) {
        const float* x = memory_.x_kept + m * K_lanes_;
        Vec even = zero(), odd = zero();
        int64_t k = 0;
        for (; k + 2 * kLanes <= K_; k += 2 * kLanes) {
          even = fma(load(A + k), load(x + k), even);
          odd = fma(load(A + k + kLanes), load(x + k + kLanes), odd);
        }
        for (; k < K_; k += kLanes) even = fma(load(A + k, K_ - k), load(x + k), even);
        const float total = sum(add(even, odd)) * p_.dropout.scale;
        p_.S[m * R_ + r] = total;
        // The lanes of the product are multiplied with factor() once more.
        memory_.S[m * R_lanes_ + r] = total * p_.scaling / Rows::factor();
      }
    });
  }

  void product(int64_t tile) {
    const int64_t n = tile * tiles_.decode_rows, rows = min(tiles_.decode_rows, N_ - n);
    struct Memory {
      float *absmax, *scales;
    };
    const auto [absmax, scale_memory] = on_scratch(Scratch::local, [&](Pieces& pieces) {
      return Memory{pieces.take<float>(absmax_count(w_, rows)),
                    pieces.take<float>(rows * ceil_div(K_, 64))};
    });
    const Source w = with_absmax(w_, n, rows, absmax);
    const float* scales = nullptr;
    if constexpr (std::is_same_v<Source, FourBit>) scales = scales_of(w, n, rows, scale_memory);
    switch (M_) {
      case 1:
        return rows_of<1>(w, n, rows, scales);
      case 2:
        return rows_of<2>(w, n, rows, scales);
      case 3:
        return rows_of<3>(w, n, rows, scales);
      case 4:
        return rows_of<4>(w, n, rows, scales);
      case 5:
        return rows_of<5>(w, n, rows, scales);
      case 6:
        return rows_of<6>(w, n, rows, scales);
      case 7:
        return rows_of<7>(w, n, rows, scales);
      case 8:
        return rows_of<8>(w, n, rows, scales);
    }
  }

  // absmax of each 64 codes of these rows, for the one source that wants them so.
  const float* scales_of(const FourBit& w, int64_t n, int64_t rows, float* scales) const {
    if (!requires { Rows::kScalesSums; }) return nullptr;
    const int64_t groups = K_ / 64;
    if (w.shift == 6) return w.absmax + n * groups;
    for (int64_t i = 0; i < rows * groups; i++) {
      scales[i] = w.absmax[(n * groups + i) >> (w.shift - 6)];
    }
    return scales;
  }

  template <int M>
  void rows_of(const Source& w, int64_t n, int64_t rows, const float* scales) {
    // More rows at a time would not leave registers for the tokens.
    constexpr int kRows = M > 4 && Rows::kRows > 2 ? 2 : Rows::kRows;
    const int64_t groups = scales ? K_ / 64 : 0;
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) some_rows<kRows, M>(w, n + i, scales + i * groups);
    for (; i < rows; i++) some_rows<1, M>(w, n + i, scales + i * groups);
  }

  template <int R, int M>
  __attribute__((noinline)) void some_rows(const Source& w, int64_t n, const float* scales) {
    Vec acc[R][M];
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) acc[i][m] = zero();
    }
    Rows::template dot<R, M>(w, scales, n, memory_.x, acc);
    if (R_ > 0) {
      with_type(p_.adapter_dtype, [&](auto* type) __attribute__((always_inline)) {
        const auto* B = static_cast<decltype(type)>(p_.lora_B) + n * R_;
        for (int64_t r = 0; r < R_; r += kLanes) {
#pragma GCC unroll 4
          for (int i = 0; i < R; i++) {
            const Vec b = load(B + i * R_ + r, R_ - r);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
              acc[i][m] = fma(b, load(memory_.S + m * R_lanes_ + r), acc[i][m]);
            }
          }
        }
      });
    }
    X* y = static_cast<X*>(p_.y) + n;
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
      const float bias = bias_of(n + i);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        from_float(sum(acc[i][m]) * Rows::factor() + bias, y[m * N_ + i]);
      }
    }
  }

  // Rows [n, n + kPanel) of a W that is stored [K, N].
  void columns(int64_t tile) {
    const int64_t n = tile * kPanel, count = min(kPanel, N_ - n);
    struct Memory {
      Unit* panel;
      float *B, *C, *bias;  // B is [R][kPanel]
    };
    const auto [panel, B, C, bias] = on_scratch(Scratch::local, [&](Pieces& pieces) {
      return Memory{pieces.take<Unit>(Rows::kUnits * kPanel), pieces.take<float>(R_ * kPanel),
                    pieces.take<float>(M_ * kPanel), pieces.take<float>(kPanel)};
    });
    Rows::columns(w_, n, count, M_, memory_.x, panel, C);
    if (R_ > 0) {
      with_type(p_.adapter_dtype, [&](auto* type) {
        copy_transposed(static_cast<decltype(type)>(p_.lora_B) + n * R_, R_, count, R_, B, kPanel);
      });
      multiply<F32>({.mv = static_cast<int>(ceil_div(count, kLanes)),
                     .nr = M_,
                     .units = R_,
                     .rows = {memory_.S, R_lanes_},
                     .panel = {B, kPanel},
                     .C = {C, kPanel, true}});
    }
    for (int64_t i = 0; i < kPanel; i++) bias[i] = i < count ? bias_of(n + i) : 0;
    for (int m = 0; m < M_; m++) {
      X* y = static_cast<X*>(p_.y) + m * N_ + n;
      for (int64_t i = 0; i < count; i += kLanes) {
        store(y + i, add(load(C + m * kPanel + i), load(bias + i)), count - i);
      }
    }
  }

  float bias_of(int64_t n) const {
    if (p_.bias == nullptr) return 0;
    float value = 0;
    with_type(p_.bias_dtype,
              [&](auto* type) { value = to_float(static_cast<decltype(type)>(p_.bias)[n]); });
    return value;
  }
};

}  // namespace FASTLORA_ISA
}  // namespace fastlora
