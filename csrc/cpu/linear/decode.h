// Forward for a handful of tokens (decoding), which takes as long as reading W.
//
// Lanes run along K, each row of W is read once, in its own order, and multiplied with all tokens; a
// packed 4-bit row is never unpacked to memory. The LoRA term joins the lanes before they are summed.
// Where W is stored [K, N], lanes run along N, a panel of columns at a time.
#pragma once

#include "../runtime/scratch.h"
#include "../runtime/tiles.h"
#include "dot.h"

namespace fastlora::FASTLORA_ISA {

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
    with_type(p_.adapter_dtype, [&]<class T>() {
      const T* A = static_cast<const T*>(p_.lora_A) + r * K_;
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
    const auto [absmax, scale_memory] = take(Scratch::local, Piece<float>{absmax_count(w_, rows)},
                                             Piece<float>{rows * ceil_div(K_, 64)});
    const Source w = with_absmax(w_, n, rows, absmax);
    const float* scales = nullptr;
    if constexpr (std::is_same_v<Source, FourBit>) scales = scales_of(w, n, rows, scale_memory);
    with_size<8>(M_,
                 [&]<int M>() __attribute__((always_inline)) { rows_of<M>(w, n, rows, scales); });
  }

  // absmax of each 64 codes of these rows, for the one Dot that asks for them.
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
      with_type(p_.adapter_dtype, [&]<class T>() __attribute__((always_inline)) {
        const T* B = static_cast<const T*>(p_.lora_B) + n * R_;
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
    // B is [R][kPanel].
    const auto [panel, B, C, bias] =
        take(Scratch::local, Piece<Unit>{Rows::kUnits * kPanel}, Piece<float>{R_ * kPanel},
             Piece<float>{M_ * kPanel}, Piece<float>{kPanel});
    Rows::columns(w_, n, count, M_, memory_.x, panel, C);
    if (R_ > 0) {
      with_type(p_.adapter_dtype, [&]<class T>() {
        copy_transposed(static_cast<const T*>(p_.lora_B) + n * R_, R_, count, R_, B, kPanel);
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
              [&]<class T>() { value = to_float(static_cast<const T*>(p_.bias)[n]); });
    return value;
  }
};

}  // namespace fastlora::FASTLORA_ISA
