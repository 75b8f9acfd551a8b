// Backward of a linear layer with LoRA, for any base.
//
//   1. Blocks of tokens: dS = scaling * dy B / (1 - p); dy is repacked only where its rows can't be
//      read as units in place.
//   2. Strips of columns, all independent of each other, each summed over the tokens in order:
//        of K: dA = dS^T (mask x) and dx = dy W + mask (dS A), W decoded as panels [n][k];
//        of N: dB = scaling * dy^T S and dbias = sum of dy.
#pragma once

#include "scratch.h"
#include "tiles.h"
#include "weights.h"

namespace fastlora {
namespace FASTLORA_ISA {

template <class Compute, class X, class Source>
class LinearBwd {
  using Unit = typename Compute::Unit;
  static constexpr int kPer = Compute::kPerUnit;

  const LoraLinearBwd& p_;
  const TileSizes& tiles_;
  const Source& w_;
  const ParallelFor& parallel_;
  const int64_t M_, N_, K_, R_, R_lanes_;
  const bool repack_;
  int64_t dy_ld_;  // in units
  int64_t strip_, k_strips_, n_strips_, panel_units_, keep_words_;
  Unit* dy_;
  float* dS_;       // [M][R_lanes], times 1 / (1 - p)
  float* A_;        // [R, K] in fp32
  float* B_lanes_;  // [N][R_lanes] in fp32, zero past R

 public:
  LinearBwd(const LoraLinearBwd& p, const Source& w, const ParallelFor& parallel)
      : p_(p),
        tiles_(p.tiles),
        w_(w),
        parallel_(parallel),
        M_(p.M),
        N_(p.weight.N),
        K_(p.weight.K),
        R_(p.R),
        R_lanes_(round_up(R_, kLanes)),
        repack_(must_repack(p)) {}

  void run(char* memory) {
    Pieces pieces{memory};
    if (repack_) {
      dy_ld_ = round_up(N_, kGroup) / kPer;
      dy_ = pieces.take<Unit>(M_ * dy_ld_);
    } else {
      dy_ld_ = p_.lddy / kPer;
      dy_ = static_cast<Unit*>(const_cast<void*>(p_.dy));
    }
    dS_ = pieces.take<float>(M_ * R_lanes_);
    B_lanes_ = pieces.take<float>(N_ * R_lanes_);
    read_adapters(pieces.take<float>(R_ * K_));
    // Few tokens: wide strips, so that whole cache lines of W's rows are read in a run.
    const bool few = M_ <= tiles_.bwd_few_tokens;
    strip_ = tiles_.bwd_strip_columns * (few ? 2 : 1);
    panel_units_ = tiles_.bwd_panel_units / (few ? 8 : 1);
    keep_words_ = strip_ / 32;
    k_strips_ = p_.dx || p_.dA ? ceil_div(K_, strip_) : 0;
    n_strips_ = p_.dB || p_.dbias ? ceil_div(N_, tiles_.bwd_strip_columns) : 0;
    each(ceil_div(M_, tiles_.bwd_token_block), &LinearBwd::shrink);
    each(k_strips_ + n_strips_, &LinearBwd::strip);
  }

  static size_t shared_bytes(const LoraLinearBwd& p) {
    const int64_t R_lanes = round_up(p.R, kLanes);
    const int64_t units = must_repack(p) ? p.M * round_up(p.weight.N, kGroup) / kPer : 0;
    return Pieces::bytes<Unit>(units) + Pieces::bytes<float>(p.M * R_lanes) +
           Pieces::bytes<float>(p.weight.N * R_lanes) + Pieces::bytes<float>(p.R * p.weight.K);
  }

 private:
  // dy's rows serve as row operand in place if they are made of whole units.
  static bool must_repack(const LoraLinearBwd& p) {
    return sizeof(X) * kPer != sizeof(Unit) || p.weight.N % kPer != 0 || p.lddy % kPer != 0;
  }

  void read_adapters(float* A) {
    A_ = static_cast<float*>(const_cast<void*>(p_.lora_A));
    with_type(p_.adapter_dtype, [&](auto* type) {
      const auto* B = static_cast<decltype(type)>(p_.lora_B);
      for (int64_t n = 0; n < N_; n++) {
        for (int64_t r = 0; r < R_lanes_; r += kLanes) {
          store(B_lanes_ + n * R_lanes_ + r, load(B + n * R_ + r, R_ - r));
        }
      }
      if (p_.adapter_dtype == DType::f32) return;
      A_ = A;
      const auto* source = static_cast<decltype(type)>(p_.lora_A);
      for (int64_t i = 0; i < R_ * K_; i++) A[i] = to_float(source[i]);
    });
  }

  void each(int64_t tiles, void (LinearBwd::*stage)(int64_t tile)) {
    for_each_tile(parallel_, this, stage, tiles);
  }

  void shrink(int64_t tile) {
    const int64_t m = tile * tiles_.bwd_token_block, rows = min(tiles_.bwd_token_block, M_ - m);
    const X* dy = static_cast<const X*>(p_.dy) + m * p_.lddy;
    if (repack_) {
      pack_rows(Compute{}, Block<X>{dy, p_.lddy, rows, N_}, round_up(N_, kGroup), dy_ + m * dy_ld_,
                dy_ld_);
    }
    if (R_ == 0) return;
    float* dS = dS_ + m * R_lanes_;
    Pieces local{static_cast<char*>(scratch(
        Scratch::local, Pieces::bytes<float>(tiles_.bwd_token_block * tiles_.bwd_shrink_columns)))};
    float* widened = local.take<float>(tiles_.bwd_token_block * tiles_.bwd_shrink_columns);
    for (int64_t n = 0; n < N_; n += tiles_.bwd_shrink_columns) {
      const int64_t count = min(tiles_.bwd_shrink_columns, N_ - n);
      const float* dy_rows = widened;
      int64_t ld = tiles_.bwd_shrink_columns;
      if constexpr (sizeof(X) == sizeof(float)) {
        dy_rows = dy + n;
        ld = p_.lddy;
      } else {
        pack_rows(F32{}, Block<X>{dy + n, p_.lddy, rows, count}, round_up(count, kLanes), widened,
                  ld);
      }
      for (int64_t r = 0; r < R_lanes_; r += kPanel) {
        const int mv = static_cast<int>(min(kPanel, R_lanes_ - r) / kLanes);
        multiply<F32>(mv, rows, dy_rows, {ld, 1}, B_lanes_ + n * R_lanes_ + r, R_lanes_, count,
                      dS + r, R_lanes_, n > 0);
      }
    }
    const Vec factor = broadcast(p_.scaling * p_.dropout.scale);
    for (int64_t i = 0; i < rows * R_lanes_; i += kLanes) store(dS + i, mul(load(dS + i), factor));
  }

  void strip(int64_t tile) {
    if (tile < k_strips_) {
      strip_of_K(tile * strip_);
    } else {
      strip_of_N((tile - k_strips_) * tiles_.bwd_strip_columns);
    }
  }

  void strip_of_K(int64_t k) {
    const int64_t keep_words = M_ * keep_words_;
    const int64_t count = min(strip_, K_ - k), tokens = min(tiles_.bwd_tokens, M_);
    // For grad_A's tokens, one panel wide, and for base_product's units.
    const int64_t panel_floats =
        max(tiles_.bwd_grad_tokens * kPanel, tiles_.bwd_panel_units * strip_);
    Pieces local{static_cast<char*>(scratch(
        Scratch::local, Pieces::bytes<uint32_t>(keep_words) + Pieces::bytes<float>(panel_floats) +
                            Pieces::bytes<float>(max(tokens, R_) * strip_) +
                            Pieces::bytes<float>(R_ * strip_)))};
    uint32_t* bits = local.take<uint32_t>(keep_words);
    float* panels = local.take<float>(panel_floats);
    float* C = local.take<float>(max(tokens, R_) * strip_);
    float* A_panels = local.take<float>(R_ * strip_);

    KeepRows kept{nullptr, keep_words_};
    if (p_.dropout.threshold != 0 && R_ > 0) {
      keep_bits_of(p_.first_row, M_, k, strip_, p_.dropout, bits);
      kept.bits = bits;
    }
    if (p_.dA && R_ > 0) grad_A(k, count, kept, panels, C);
    if (p_.dx == nullptr) return;
    if (R_ > 0) {
      weight_panels(F32{}, Dense<float>{A_, K_}, 0, R_, k, count,
                    Panels<float>{A_panels, R_ * kPanel});
    }
    for (int64_t m = 0; m < M_; m += tiles_.bwd_tokens) {
      const int64_t rows = min(tiles_.bwd_tokens, M_ - m);
      if (R_ > 0) {
        for (int64_t q = 0; q * kPanel < count; q++) {
          multiply<F32>(kPanelVectors, rows, dS_ + m * R_lanes_, {R_lanes_, 1},
                        A_panels + q * R_ * kPanel, kPanel, R_, C + q * kPanel, strip_, false);
        }
        if (kept.bits) drop(bits + m * keep_words_, rows, C);
      }
      base_product(m, rows, k, count, reinterpret_cast<Unit*>(panels), C);
      X* dx = static_cast<X*>(p_.dx) + m * K_ + k;
      for (int64_t i = 0; i < rows; i++) {
        for (int64_t c = 0; c < count; c += kLanes) {
          store(dx + i * K_ + c, load(C + i * strip_ + c), count - c);
        }
      }
    }
  }

  void drop(const uint32_t* bits, int64_t rows, float* C) const {
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t c = 0; c < strip_; c += kLanes) {
        float* at = C + i * strip_ + c;
        store(at, keep(load(at), lane_bits(bits + i * keep_words_, c)));
      }
    }
  }

  // C[m][strip_] (+)= dy W for columns [k, k + count).
  void base_product(int64_t m, int64_t rows, int64_t k, int64_t count, Unit* panels, float* C) {
    const int64_t step = panel_units_ * kPer;
    for (int64_t n = 0; n < N_; n += step) {
      const int64_t n_rows = min(step, N_ - n), units = ceil_div(n_rows, kPer);
      const Panels<Unit> out{panels, panel_units_ * kPanel};
      weight_panels(Compute{}, w_, n, n_rows, k, count, out);
      for (int64_t c = 0; c < count; c += kPanel) {
        const int mv = static_cast<int>(ceil_div(min(kPanel, count - c), kLanes));
        multiply_base<Compute>(p_.pair_product, mv, rows, dy_ + m * dy_ld_ + n / kPer, dy_ld_,
                               panels + c / kPanel * out.stride, kPanel, units, C + c, strip_,
                               n > 0 || R_ > 0);
      }
    }
  }

  // dA[r][k] = sum over m of dS[m][r] (mask x)[m][k].
  void grad_A(int64_t k, int64_t count, KeepRows kept, float* panel, float* C) {
    const X* x = static_cast<const X*>(p_.x) + k;
    for (int64_t c = 0; c < count; c += kPanel) {
      const int64_t columns = min(kPanel, count - c);
      for (int64_t m = 0; m < M_; m += tiles_.bwd_grad_tokens) {
        const int64_t rows = min(tiles_.bwd_grad_tokens, M_ - m);
        const KeepRows part{kept.bits ? kept.bits + m * keep_words_ : nullptr, keep_words_};
        pack_columns(Block<X>{x + m * p_.ldx + c, p_.ldx, rows, columns}, part, c, panel);
        multiply<F32>(kPanelVectors, R_, dS_ + m * R_lanes_, {1, R_lanes_}, panel, kPanel, rows, C,
                      kPanel, m > 0);
      }
      for (int64_t r = 0; r < R_; r++) {
        for (int64_t j = 0; j < columns; j += kLanes) {
          store(p_.dA + r * K_ + k + c + j, load(C + r * kPanel + j), columns - j);
        }
      }
    }
  }

  // dB[n][r] = scaling * sum over m of dy[m][n] S[m][r], and dbias[n] = sum over m of dy[m][n].
  void strip_of_N(int64_t n) {
    const int64_t count = min(tiles_.bwd_strip_columns, N_ - n),
                  R_padded = round_up(max(R_, 1), kLanes);
    Pieces local{static_cast<char*>(
        scratch(Scratch::local, Pieces::bytes<float>(tiles_.bwd_grad_tokens * kPanel) +
                                    Pieces::bytes<float>(R_padded * kPanel) +
                                    Pieces::bytes<float>(kPanel)))};
    float* panel = local.take<float>(tiles_.bwd_grad_tokens * kPanel);
    float* C = local.take<float>(R_padded * kPanel);
    float* total = local.take<float>(kPanel);
    const X* dy = static_cast<const X*>(p_.dy) + n;
    for (int64_t c = 0; c < count; c += kPanel) {
      const int64_t columns = min(kPanel, count - c);
      for (int64_t j = 0; j < kPanel; j += kLanes) store(total + j, zero());
      for (int64_t m = 0; m < M_; m += tiles_.bwd_grad_tokens) {
        const int64_t rows = min(tiles_.bwd_grad_tokens, M_ - m);
        pack_columns(Block<X>{dy + m * p_.lddy + c, p_.lddy, rows, columns}, KeepRows{nullptr, 0},
                     0, panel);
        if (p_.dB) {
          multiply<F32>(kPanelVectors, R_, p_.S + m * R_, {1, R_}, panel, kPanel, rows, C, kPanel,
                        m > 0);
        }
        if (p_.dbias) add_rows(panel, rows, total);
      }
      if (p_.dbias) {
        for (int64_t j = 0; j < columns; j += kLanes) {
          store(p_.dbias + n + c + j, load(total + j), columns - j);
        }
      }
      if (p_.dB) store_dB(n + c, columns, C);
    }
  }

  // total[j] += sum over i of panel[i][j], in short partial sums for a small error.
  static void add_rows(const float* panel, int64_t rows, float* total) {
    constexpr int64_t kPart = 16;
    for (int64_t i = 0; i < rows; i += kPart) {
      const int64_t end = min(rows, i + kPart);
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        Vec part = zero();
        for (int64_t k = i; k < end; k++) part = add(part, load(panel + k * kPanel + j));
        store(total + j, add(load(total + j), part));
      }
    }
  }

  void store_dB(int64_t n, int64_t columns, const float* C) {
    const Vec scaling = broadcast(p_.scaling);
    for (int64_t j = 0; j < columns; j += kLanes) {
      for (int64_t r = 0; r < R_; r += kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; i++) {
          block[i] = r + i < R_ ? mul(load(C + (r + i) * kPanel + j), scaling) : zero();
        }
        transpose(block);
        const int64_t rows = min(kLanes, columns - j);
        for (int64_t i = 0; i < rows; i++) {
          store(p_.dB + (n + j + i) * R_ + r, block[i], R_ - r);
        }
      }
    }
  }
};

}  // namespace FASTLORA_ISA
}  // namespace fastlora
