// Backward of linear layers with LoRA that read one x, for any base.
//
//   1. Blocks of tokens: dS = scaling * dy B / (1 - p); dy is repacked only where its rows can't be
//      read as units in place.
//   2. Strips of columns, all independent of each other, each summed over the tokens in order:
//        of K: dA = dS^T (mask x), and dx = dy W + mask (dS A) summed over the layers on one fp32
//              tile, W decoded as panels [n][k];
//        of N: dB = scaling * dy^T S and dbias = sum of dy.
#pragma once

#include <new>

#include "../runtime/scratch.h"
#include "../runtime/table.h"
#include "../runtime/tiles.h"
#include "../weight/with_weight.h"
#include "microkernel.h"

namespace fastlora::FASTLORA_ISA {

template <class Compute, class X, class Source>
class SharedBwd;

// One of the layers.
template <class Compute, class X, class Source>
class LinearBwd {
  friend class SharedBwd<Compute, X, Source>;
  using Unit = typename Compute::Unit;
  static constexpr int kPer = Compute::kPerUnit;

  const LoraLinearBwd& p_;
  const TileSizes& tiles_;
  const PairProduct pair_product_;
  const Operand<Source> operand_;
  const Source& w_;
  const int64_t M_, N_, K_, R_, R_lanes_;
  const bool repack_;
  const int64_t dy_ld_;  // in units
  int64_t strip_, n_strips_, panel_units_, keep_words_;

  struct Memory {
    float* absmax;   // nested statistics, decoded
    Unit* dy;        // [M][dy_ld]
    float* dS;       // [M][R_lanes], times 1 / (1 - p)
    float* B_lanes;  // [N][R_lanes] in fp32, zero past R
    float* A;        // [R, K] in fp32
  };
  const Memory memory_;
  const Unit* dy_;  // dy itself, or memory_.dy
  const float* A_;  // lora_A itself, or memory_.A

 public:
  LinearBwd(const LoraLinearBwd& p, const Memory& memory, const Machine& machine)
      : p_(p),
        tiles_(p.tiles),
        pair_product_(machine.pair_product),
        operand_(p.weight,
                 p.dx ? plain_absmax(p.weight, machine.parallel, memory.absmax) : nullptr),
        w_(operand_.source),
        M_(p.M),
        N_(p.weight.N),
        K_(p.weight.K),
        R_(p.R),
        R_lanes_(round_up(R_, kLanes)),
        repack_(must_repack(p)),
        dy_ld_(repack_ ? repacked_ld(p) : p.lddy / kPer),
        memory_(memory),
        dy_(repack_ ? memory.dy : static_cast<const Unit*>(p.dy)),
        A_(in_fp32(p.lora_A, p.adapter_dtype, 0, R_ * K_, memory.A)) {
    read_B();
    // Few tokens: wide strips, so that whole cache lines of W's rows are read in a run.
    const bool few = M_ <= tiles_.bwd_few_tokens;
    strip_ = tiles_.bwd_strip_columns * (few ? 2 : 1);
    panel_units_ = tiles_.bwd_panel_units / (few ? 8 : 1);
    keep_words_ = strip_ / 32;
    n_strips_ = p_.dB || p_.dbias ? ceil_div(N_, tiles_.bwd_strip_columns) : 0;
  }

  static Memory lay_out(Pieces& pieces, const LoraLinearBwd& p) {
    const int64_t R_lanes = round_up(p.R, kLanes);
    return {pieces.take<float>(p.dx && is_nested(p.weight) ? blocks_of(p.weight) : 0),
            pieces.take<Unit>(must_repack(p) ? p.M * repacked_ld(p) : 0),
            pieces.take<float>(p.M * R_lanes), pieces.take<float>(p.weight.N * R_lanes),
            pieces.take<float>(p.R * p.weight.K)};
  }

 private:
  // dy's rows are the row operand as they are if they consist of whole units.
  static bool must_repack(const LoraLinearBwd& p) {
    return sizeof(X) * kPer != sizeof(Unit) || p.weight.N % kPer != 0 || p.lddy % kPer != 0;
  }

  static int64_t repacked_ld(const LoraLinearBwd& p) { return round_up(p.weight.N, kGroup) / kPer; }

  void read_B() {
    with_type(p_.adapter_dtype, [&]<class T>() {
      const T* B = static_cast<const T*>(p_.lora_B);
      for (int64_t n = 0; n < N_; n++) {
        for (int64_t r = 0; r < R_lanes_; r += kLanes) {
          store(memory_.B_lanes + n * R_lanes_ + r, load(B + n * R_ + r, R_ - r));
        }
      }
    });
  }

  void shrink(int64_t tile) {
    const int64_t m = tile * tiles_.bwd_token_block, rows = min(tiles_.bwd_token_block, M_ - m);
    const X* dy = static_cast<const X*>(p_.dy) + m * p_.lddy;
    if (repack_) {
      pack_rows(Compute{}, Block<X>{dy, p_.lddy, rows, N_}, round_up(N_, kGroup),
                memory_.dy + m * dy_ld_, dy_ld_);
    }
    if (R_ == 0) return;
    float* dS = memory_.dS + m * R_lanes_;
    const auto [widened] =
        take(Scratch::local, Piece<float>{tiles_.bwd_token_block * tiles_.bwd_shrink_columns});
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
        multiply<F32>({.mv = mv,
                       .nr = rows,
                       .units = count,
                       .rows = {dy_rows, ld},
                       .panel = {memory_.B_lanes + n * R_lanes_ + r, R_lanes_},
                       .C = {dS + r, R_lanes_, n > 0}});
      }
    }
    const Vec factor = broadcast(p_.scaling * p_.dropout.scale);
    for (int64_t i = 0; i < rows * R_lanes_; i += kLanes) store(dS + i, mul(load(dS + i), factor));
  }

  bool drops() const { return p_.dropout.threshold != 0 && R_ > 0; }

  void drop(const uint32_t* bits, int64_t rows, float* C) const {
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t c = 0; c < strip_; c += kLanes) {
        float* at = C + i * strip_ + c;
        store(at, keep(load(at), lane_bits(bits + i * keep_words_, c)));
      }
    }
  }

  // C[m][strip_] (+)= mask (dS A) for the columns of A_panels; T is as large as C.
  void lora_product(int64_t m, int64_t rows, int64_t count, const float* A_panels,
                    const uint32_t* bits, bool accumulate, float* C, float* T) const {
    float* out = drops() && accumulate ? T : C;
    for (int64_t q = 0; q * kPanel < count; q++) {
      multiply<F32>({.mv = kPanelVectors,
                     .nr = rows,
                     .units = R_,
                     .rows = {memory_.dS + m * R_lanes_, R_lanes_},
                     .panel = {A_panels + q * R_ * kPanel, kPanel},
                     .C = {out + q * kPanel, strip_, accumulate && out == C}});
    }
    if (drops()) drop(bits + m * keep_words_, rows, out);
    if (out == C) return;
    for (int64_t i = 0; i < rows * strip_; i += kLanes) {
      store(C + i, add(load(C + i), load(T + i)));
    }
  }

  // C[m][strip_] (+)= dy W for columns [k, k + count).
  void base_product(int64_t m, int64_t rows, int64_t k, int64_t count, bool accumulate,
                    Unit* panels, float* C) const {
    const int64_t step = panel_units_ * kPer;
    for (int64_t n = 0; n < N_; n += step) {
      const int64_t n_rows = min(step, N_ - n), units = ceil_div(n_rows, kPer);
      const Panels<Unit> out{panels, panel_units_ * kPanel};
      weight_panels(Compute{}, w_, n, n_rows, k, count, out);
      for (int64_t c = 0; c < count; c += kPanel) {
        const int mv = static_cast<int>(ceil_div(min(kPanel, count - c), kLanes));
        multiply_base<Compute>(pair_product_, {.mv = mv,
                                               .nr = rows,
                                               .units = units,
                                               .rows = {dy_ + m * dy_ld_ + n / kPer, dy_ld_},
                                               .panel = {panels + c / kPanel * out.stride, kPanel},
                                               .C = {C + c, strip_, n > 0 || accumulate}});
      }
    }
  }

  // Columns [k, k + columns) of dA from C [R][kPanel].
  void store_dA(int64_t k, int64_t columns, const float* C) const {
    for (int64_t r = 0; r < R_; r++) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        store(p_.dA + r * K_ + k + j, load(C + r * kPanel + j), columns - j);
      }
    }
  }

  // dB[n][r] = scaling * sum over m of dy[m][n] S[m][r], and dbias[n] = sum over m of dy[m][n].
  void strip_of_N(int64_t n) {
    const int64_t count = min(tiles_.bwd_strip_columns, N_ - n),
                  R_padded = round_up(max(R_, 1), kLanes);
    const auto [panel, C, total] =
        take(Scratch::local, Piece<float>{tiles_.bwd_grad_tokens * kPanel},
             Piece<float>{R_padded * kPanel}, Piece<float>{kPanel});
    const X* dy = static_cast<const X*>(p_.dy) + n;
    for (int64_t c = 0; c < count; c += kPanel) {
      const int64_t columns = min(kPanel, count - c);
      for (int64_t j = 0; j < kPanel; j += kLanes) store(total + j, zero());
      for (int64_t m = 0; m < M_; m += tiles_.bwd_grad_tokens) {
        const int64_t rows = min(tiles_.bwd_grad_tokens, M_ - m);
        pack_columns(Block<X>{dy + m * p_.lddy + c, p_.lddy, rows, columns}, panel);
        if (p_.dB) {
          multiply<F32>({.mv = kPanelVectors,
                         .nr = R_,
                         .units = rows,
                         .rows = {p_.S + m * R_, 1, R_},
                         .panel = {panel, kPanel},
                         .C = {C, kPanel, m > 0}});
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

// All of the layers.
template <class Compute, class X, class Source>
class SharedBwd {
  using Layer = LinearBwd<Compute, X, Source>;
  using Unit = typename Compute::Unit;

  const LoraLinearBwd* const params_;
  const int64_t count_;
  const Machine& machine_;
  Layer* layers_;
  int64_t k_strips_, token_blocks_, R_;  // R_: all ranks together
  bool needs_dA_;                        // else x may be null

 public:
  SharedBwd(const LayersOf<LoraLinearBwd>& layers, const Machine& machine)
      : params_(layers.data), count_(layers.count), machine_(machine) {}

  void run() {
    on_scratch(Scratch::shared, [&](Pieces& pieces) { lay_out(pieces); });
    int64_t n_strips = 0;
    bool needs_dx = false;
    needs_dA_ = false;
    R_ = 0;
    for (int64_t i = 0; i < count_; i++) {
      const LoraLinearBwd& p = params_[i];
      n_strips += layers_[i].n_strips_;
      needs_dx |= p.dx != nullptr;
      needs_dA_ |= p.dA && p.R > 0;
      R_ += p.R;
    }
    k_strips_ = needs_dx || needs_dA_ ? ceil_div(layers_->K_, layers_->strip_) : 0;
    token_blocks_ = ceil_div(layers_->M_, layers_->tiles_.bwd_token_block);
    for_each_tile(machine_.parallel, this, &SharedBwd::shrink, token_blocks_ * count_);
    for_each_tile(machine_.parallel, this, &SharedBwd::strip, k_strips_ + n_strips);
  }

 private:
  // Constructs the layers as soon as there is memory.
  void lay_out(Pieces& pieces) {
    layers_ = pieces.take<Layer>(count_);
    for (int64_t i = 0; i < count_; i++) {
      const auto memory = Layer::lay_out(pieces, params_[i]);
      if (!pieces.only_counts()) new (layers_ + i) Layer(params_[i], memory, machine_);
    }
  }

  void shrink(int64_t tile) { layers_[tile / token_blocks_].shrink(tile % token_blocks_); }

  void strip(int64_t tile) {
    if (tile < k_strips_) return strip_of_K(tile * layers_->strip_);
    tile -= k_strips_;
    Layer* layer = layers_;
    for (; tile >= layer->n_strips_; layer++) tile -= layer->n_strips_;
    layer->strip_of_N(tile * layer->tiles_.bwd_strip_columns);
  }

  void strip_of_K(int64_t k) {
    const Layer& first = *layers_;
    const TileSizes& tiles = first.tiles_;
    const int64_t M = first.M_, K = first.K_, strip = first.strip_;
    const int64_t keep_words = M * first.keep_words_;
    const int64_t count = min(strip, K - k), tokens = min(tiles.bwd_tokens, M);
    // For grad_A's tokens, one panel wide, and for base_product's units.
    const int64_t panel_floats = max(tiles.bwd_grad_tokens * kPanel, tiles.bwd_panel_units * strip);
    const int64_t tile_floats = max(tokens, R_) * strip;
    const bool several = count_ > 1;  // one layer needs either kind of panel, and one tile
    struct Memory {
      uint32_t* bits;
      float *panels, *dropped, *C, *T, *A_panels;
    };
    const auto [bits, panels, dropped, C, T, A_panels] =
        on_scratch(Scratch::local, [&](Pieces& pieces) {
          uint32_t* bits = pieces.take<uint32_t>(count_ * keep_words);
          float* panels = pieces.take<float>(panel_floats);
          float* dropped = several ? pieces.take<float>(panel_floats) : panels;
          float* C = pieces.take<float>(tile_floats);
          float* T = several ? pieces.take<float>(tile_floats) : nullptr;
          return Memory{bits, panels, dropped, C, T, pieces.take<float>(R_ * strip)};
        });

    for (int64_t i = 0; i < count_; i++) {
      const LoraLinearBwd& p = layers_[i].p_;
      if (!layers_[i].drops()) continue;
      keep_bits_of(p.first_row, M, k, strip, p.dropout, bits + i * keep_words);
    }
    if (needs_dA_) grad_A(k, count, bits, panels, dropped, C);
    if (first.p_.dx == nullptr) return;
    float* A = A_panels;
    for (int64_t i = 0; i < count_; A += layers_[i++].R_ * strip) {
      const Layer& layer = layers_[i];
      if (layer.R_ == 0) continue;
      weight_panels(F32{}, Dense<float>{layer.A_, K}, 0, layer.R_, k, count,
                    Panels<float>{A, layer.R_ * kPanel});
    }
    for (int64_t m = 0; m < M; m += tiles.bwd_tokens) {
      const int64_t rows = min(tiles.bwd_tokens, M - m);
      A = A_panels;
      for (int64_t i = 0; i < count_; A += layers_[i++].R_ * strip) {
        const Layer& layer = layers_[i];
        if (layer.R_ > 0) {
          layer.lora_product(m, rows, count, A, bits + i * keep_words, i > 0, C, T);
        }
        layer.base_product(m, rows, k, count, i > 0 || layer.R_ > 0,
                           reinterpret_cast<Unit*>(panels), C);
      }
      X* dx = static_cast<X*>(first.p_.dx) + m * K + k;
      for (int64_t i = 0; i < rows; i++) {
        for (int64_t c = 0; c < count; c += kLanes) {
          store(dx + i * K + c, load(C + i * strip + c), count - c);
        }
      }
    }
  }

  // dA[r][k] = sum over m of dS[m][r] (mask x)[m][k], for each layer; those that drop nothing share
  // the panels of x.
  void grad_A(int64_t k, int64_t count, const uint32_t* bits, float* whole, float* dropped,
              float* C) const {
    const Layer& first = *layers_;
    const int64_t M = first.M_, grad_tokens = first.tiles_.bwd_grad_tokens;
    const int64_t words = first.keep_words_;
    const X* x = static_cast<const X*>(first.p_.x) + k;
    for (int64_t c = 0; c < count; c += kPanel) {
      const int64_t columns = min(kPanel, count - c);
      for (int64_t m = 0; m < M; m += grad_tokens) {
        const int64_t rows = min(grad_tokens, M - m);
        const Block<X> block{x + m * first.p_.ldx + c, first.p_.ldx, rows, columns};
        bool packed = false;
        float* sum = C;
        for (int64_t i = 0; i < count_; sum += layers_[i++].R_ * kPanel) {
          const Layer& layer = layers_[i];
          if (layer.p_.dA == nullptr || layer.R_ == 0) continue;
          if (layer.drops()) {
            pack_columns(block, dropped, KeepRows{bits + (i * M + m) * words, words}, c);
          } else if (!packed) {
            pack_columns(block, whole);
            packed = true;
          }
          multiply<F32>({.mv = kPanelVectors,
                         .nr = layer.R_,
                         .units = rows,
                         .rows = {layer.memory_.dS + m * layer.R_lanes_, 1, layer.R_lanes_},
                         .panel = {layer.drops() ? dropped : whole, kPanel},
                         .C = {sum, kPanel, m > 0}});
        }
      }
      float* sum = C;
      for (int64_t i = 0; i < count_; sum += layers_[i++].R_ * kPanel) {
        if (layers_[i].p_.dA) layers_[i].store_dA(k + c, columns, sum);
      }
    }
  }
};

}  // namespace fastlora::FASTLORA_ISA
