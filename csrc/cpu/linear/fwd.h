// Forward of linear layers with LoRA that read one x, for any base: y = x W^T + bias + scaling * S B^T.
//
// Tokens are in vector lanes, so that W is read in its own order, and a strip of it once for all tokens:
//
//   1. x is packed into panels [k][tokens], once for all layers; each S = drop(x) A^T comes from the
//      same block while it is hot.
//   2. Partial sums of S over k are added up in a fixed order.
//   3. Chunks of W's rows: decode a strip, multiply it with every panel, add scaling * S B^T onto the
//      fp32 tile, add the bias, transpose the tile and round it once into y.
#pragma once

#include <new>

#include "../runtime/scratch.h"
#include "../runtime/table.h"
#include "../runtime/tiles.h"
#include "../weight/transposed.h"
#include "microkernel.h"

namespace fastlora::FASTLORA_ISA {

template <class Compute, class X, class Source>
class SharedFwd;

// One of the layers.
template <class Compute, class X, class Source>
class LinearFwd {
  friend class SharedFwd<Compute, X, Source>;
  using Unit = typename Compute::Unit;
  static constexpr int kPer = Compute::kPerUnit;

  const LoraLinearFwd& p_;
  const TileSizes& tiles_;
  const PairProduct pair_product_;
  const Operand<Source> operand_;
  const Source& w_;
  const int64_t N_, K_, R_;
  const int64_t units_;  // of one packed token

  // Of the tokens being worked on.
  int64_t m0_, tokens_, panels_, token_lanes_;
  int64_t split_, splits_;  // columns of one partial sum of S, and their number
  int64_t chunk_, strip_rows_, strip_units_;
  const Unit* x_panels_;

  struct Memory {
    float* partial;  // [splits][R][token_lanes]
    float* S_lanes;  // [panel][R][lanes], scaled
    float* A;        // [R, K] in fp32
  };
  const Memory memory_;
  const float* const A_;  // in fp32

 public:
  LinearFwd(const LoraLinearFwd& p, const Memory& memory, PairProduct pair_product)
      : p_(p),
        tiles_(p.tiles),
        pair_product_(pair_product),
        operand_(p.weight, p.weight.quant.absmax),
        w_(operand_.source),
        N_(p.weight.N),
        K_(p.weight.K),
        R_(p.R),
        units_(units_of(p)),
        memory_(memory),
        A_(in_fp32(p.lora_A, p.adapter_dtype, 0, R_ * K_, memory_.A)) {}

  // For at most `tokens` tokens at a time.
  static Memory lay_out(Pieces& pieces, const LoraLinearFwd& p, int64_t tokens) {
    const int64_t lanes = round_up(tokens, kPanel);
    return {pieces.take<float>(max_splits(p) * p.R * lanes), pieces.take<float>(p.R * lanes),
            pieces.take<float>(p.R * p.weight.K)};
  }

 private:
  static int64_t units_of(const LoraLinearFwd& p) {
    return round_up(p.weight.K, 2 * kPanel) / kPer;
  }
  static int64_t split_of(const LoraLinearFwd& p) {
    return max(2 * p.tiles.fwd_shrink_columns, round_up(p.weight.K / 8, 2 * kPanel));
  }
  static int64_t max_splits(const LoraLinearFwd& p) { return ceil_div(p.weight.K, split_of(p)); }

  // For tokens [m0, m0 + tokens), packed in x_panels.
  void plan(const Unit* x_panels, int64_t m0, int64_t tokens) {
    m0_ = m0;
    tokens_ = tokens;
    x_panels_ = x_panels;
    panels_ = ceil_div(tokens_, kPanel);
    token_lanes_ = panels_ * kPanel;
    split_ = round_up(split_of(p_), kDropoutBlock);
    splits_ = ceil_div(K_, split_);
    // With one panel, a strip as high as one tile stays in L1 and W is read once from memory.
    strip_units_ = tiles_.fwd_strip_bytes / 4 * (panels_ == 1 ? 2 : 1);
    chunk_ = tiles_.fwd_strip_rows * (panels_ == 1 ? 2 : 1);
    const int64_t few_rows = tiles_.fwd_few_rows ? tiles_.fwd_few_rows : kTileRows[vectors(0)];
    strip_rows_ = panels_ == 1 ? few_rows : chunk_;
    if constexpr (!kStoredByRows<Source>) {
      constexpr int64_t kLine = 64 / sizeof(*w_.data);  // cache lines run across the strip
      chunk_ = round_up(chunk_, kLine);
      strip_rows_ = round_up(strip_rows_, kLine);
    }
  }

  int vectors(int64_t panel) const {
    return static_cast<int>(ceil_div(min(kPanel, tokens_ - panel * kPanel), kLanes));
  }
  const Unit* x_panel(int64_t panel) const { return x_panels_ + panel * kPanel * units_; }

  // Adds columns [k, k + count) of split `split` to S, for the tokens of a panel in fp32.
  void shrink(int64_t panel, int64_t split, int64_t k, int64_t count, const float* panel_data) {
    const int mv = vectors(panel);
    float* S = memory_.partial + split * R_ * token_lanes_ + panel * kPanel;
    multiply<F32>({.mv = mv,
                   .nr = R_,
                   .units = count,
                   .rows = {A_ + k, K_},
                   .panel = {panel_data, mv * kLanes},
                   .C = {S, token_lanes_, k > split * split_}});
  }

  // S = sum of the partial sums; kept once as it is, for the backward, and once scaled, in lanes.
  void reduce(int64_t panel) {
    const int mv = vectors(panel);
    const Vec unscaled = broadcast(p_.dropout.scale), scaling = broadcast(p_.scaling);
    float* lanes = memory_.S_lanes + panel * kPanel * R_;
    for (int v = 0; v < mv; v++) {
      const int64_t token = panel * kPanel + v * kLanes;
      for (int64_t r0 = 0; r0 < R_; r0 += kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; i++) {
          const int64_t r = r0 + i;
          block[i] = zero();
          if (r >= R_) continue;
          for (int64_t s = 0; s < splits_; s++) {
            block[i] = add(block[i], load(memory_.partial + (s * R_ + r) * token_lanes_ + token));
          }
          block[i] = mul(block[i], unscaled);
          store(lanes + (r * mv + v) * kLanes, mul(block[i], scaling));
        }
        transpose(block);
        const int64_t rows = min(kLanes, tokens_ - token);
        for (int64_t i = 0; i < rows; i++) {
          store(p_.S + (m0_ + token + i) * R_ + r0, block[i], R_ - r0);
        }
      }
    }
  }

  void product(int64_t tile) {
    const int64_t n0 = tile * chunk_, rows = min(chunk_, N_ - n0);
    const int64_t ld = strip_units_ + kLanes;  // off the power of two: rows share no cache set
    const auto [strip, C, B, bias_memory, absmax] =
        take(Scratch::local, Piece<Unit>{strip_rows_ * ld}, Piece<float>{chunk_ * token_lanes_},
             Piece<float>{chunk_ * R_}, Piece<float>{chunk_ + kLanes},
             Piece<float>{absmax_count(w_, rows)});
    const Source w = with_absmax(w_, n0, rows, absmax);

    const int64_t step = strip_units_ * kPer;
    for (int64_t i = 0; i < rows; i += strip_rows_) {
      const int64_t strip_rows = min(strip_rows_, rows - i);
      for (int64_t k = 0; k < K_; k += step) {
        const int64_t count = min(step, K_ - k), units = ceil_div(count, kPer);
        const Unit* rows_data = strip;
        int64_t row_stride = ld;
        if (const Unit* in_place = rows_in_place(n0 + i, k)) {
          rows_data = in_place;
          row_stride = K_ / kPer;
        } else {
          weight_rows(Compute{}, w, n0 + i, strip_rows, k, count, strip, ld);
        }
        for (int64_t panel = 0; panel < panels_; panel++) {
          const int mv = vectors(panel);
          multiply_base<Compute>(
              pair_product_, {.mv = mv,
                              .nr = strip_rows,
                              .units = units,
                              .rows = {rows_data, row_stride},
                              .panel = {x_panel(panel) + k / kPer * mv * kLanes, mv * kLanes},
                              .C = {C + i * token_lanes_ + panel * kPanel, token_lanes_, k > 0}});
        }
      }
    }
    if (R_ > 0) add_lora(n0, rows, B, C);
    const float* bias = read_bias(n0, rows, bias_memory);
    finish(n0, rows, bias, C);
  }

  // Rows of a dense weight as they are in memory, if they consist of whole units.
  const Unit* rows_in_place(int64_t n, int64_t k) const {
    if constexpr (kStoredByRows<Source> && !std::is_same_v<Source, FourBit>) {
      if constexpr (sizeof(*w_.data) * kPer == sizeof(Unit)) {
        if (K_ % kPer == 0) return reinterpret_cast<const Unit*>(w_.data + n * K_ + k);
      }
    }
    return nullptr;
  }

  void add_lora(int64_t n0, int64_t rows, float* B, float* C) const {
    const float* B_rows = in_fp32(p_.lora_B, p_.adapter_dtype, n0 * R_, rows * R_, B);
    for (int64_t panel = 0; panel < panels_; panel++) {
      const int mv = vectors(panel);
      multiply<F32>({.mv = mv,
                     .nr = rows,
                     .units = R_,
                     .rows = {B_rows, R_},
                     .panel = {memory_.S_lanes + panel * kPanel * R_, mv * kLanes},
                     .C = {C + panel * kPanel, token_lanes_, true}});
    }
  }

  const float* read_bias(int64_t n0, int64_t rows, float* memory) const {
    if (p_.bias) return in_fp32(p_.bias, p_.bias_dtype, n0, rows, memory);
    for (int64_t i = 0; i < rows; i++) memory[i] = 0;
    return memory;
  }

  // y[m][n] = round(C[n][m] + bias[n]).
  void finish(int64_t n0, int64_t rows, const float* bias, const float* C) const {
    X* y = static_cast<X*>(p_.y) + m0_ * N_ + n0;
    for (int64_t m = 0; m < tokens_; m += kLanes) {
      for (int64_t n = 0; n < rows; n += kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; i++) {
          block[i] = n + i < rows ? load(C + (n + i) * token_lanes_ + m) : zero();
        }
        transpose(block);
        const Vec b = load(bias + n, rows - n);
        const int64_t count = min(kLanes, tokens_ - m);
        for (int64_t i = 0; i < count; i++) {
          store(y + (m + i) * N_ + n, add(block[i], b), rows - n);
        }
      }
    }
  }
};

// All of the layers.
template <class Compute, class X, class Source>
class SharedFwd {
  using Layer = LinearFwd<Compute, X, Source>;
  using Unit = typename Compute::Unit;
  static constexpr int kPer = Compute::kPerUnit;

  const LoraLinearFwd* const params_;
  const int64_t count_;
  const Machine& machine_;
  Layer* layers_;
  Unit* x_panels_;  // x as units, for all layers

 public:
  SharedFwd(const LayersOf<LoraLinearFwd>& layers, const Machine& machine)
      : params_(layers.data), count_(layers.count), machine_(machine) {}

  void run() {
    const int64_t M = params_->M, most = min(M, tokens_at_a_time());
    on_scratch(Scratch::shared, [&](Pieces& pieces) { lay_out(pieces, most); });
    for (int64_t m0 = 0; m0 < M; m0 += most) {
      const int64_t tokens = min(most, M - m0);
      int64_t reduced = 0, chunks = 0;
      for (int64_t i = 0; i < count_; i++) {
        layers_[i].plan(x_panels_, m0, tokens);
        reduced += reductions(layers_[i]);
        chunks += ceil_div(layers_[i].N_, layers_[i].chunk_);
      }
      for_each_tile(machine_.parallel, this, &SharedFwd::pack_and_shrink,
                    layers_->panels_ * layers_->splits_);
      for_each_tile(machine_.parallel, this, &SharedFwd::reduce, reduced);
      for_each_tile(machine_.parallel, this, &SharedFwd::product, chunks);
    }
  }

 private:
  // So many that packed x stays within a shared cache.
  int64_t tokens_at_a_time() const {
    const int64_t bytes = Layer::units_of(*params_) * kPer * 4;
    return max(4 * kPanel, params_->tiles.fwd_pack_bytes / bytes / kPanel * kPanel);
  }

  // Constructs the layers as soon as there is memory.
  void lay_out(Pieces& pieces, int64_t tokens) {
    layers_ = pieces.take<Layer>(count_);
    x_panels_ = pieces.take<Unit>(round_up(tokens, kPanel) * Layer::units_of(*params_));
    for (int64_t i = 0; i < count_; i++) {
      const auto memory = Layer::lay_out(pieces, params_[i], tokens);
      if (pieces.only_counts()) continue;
      new (layers_ + i) Layer(params_[i], memory, machine_.pair_product);
    }
  }

  static int64_t reductions(const Layer& layer) { return layer.R_ > 0 ? layer.panels_ : 0; }

  void pack_and_shrink(int64_t tile) {
    const Layer& first = *layers_;
    const LoraLinearFwd& p = *params_;
    const int64_t panel = tile / first.splits_, split = tile % first.splits_;
    const int64_t m = first.m0_ + panel * kPanel, k_begin = split * first.split_;
    const int64_t rows = min(kPanel, first.m0_ + first.tokens_ - m);
    const int64_t k_end = min(first.K_, k_begin + first.split_);
    const int mv = first.vectors(panel);
    const X* x = static_cast<const X*>(p.x) + m * p.ldx;
    Unit* out = x_panels_ + panel * kPanel * first.units_ + k_begin / kPer * mv * kLanes;
    const Block<X> block{x + k_begin, p.ldx, rows, k_end - k_begin};
    pack_tokens(Compute{}, block, round_up(block.count, 2 * kLanes), mv, out);

    const int64_t step = p.tiles.fwd_shrink_columns, words = step / 32;
    const auto [whole_memory, kept_memory, bits] =
        take(Scratch::local, Piece<float>{step * kPanel}, Piece<float>{step * kPanel},
             Piece<uint32_t>{kPanel * words});
    for (int64_t k = k_begin; k < k_end; k += step) {
      const int64_t count = min(step, k_end - k);
      const Block<X> part{x + k, p.ldx, rows, count};
      const float* whole = nullptr;  // x without dropout, for all layers that drop nothing
      if constexpr (kPer == 1) {
        whole = reinterpret_cast<const float*>(out) + (k - k_begin) * mv * kLanes;
      }
      for (int64_t i = 0; i < count_; i++) {
        Layer& layer = layers_[i];
        const Dropout& dropout = layer.p_.dropout;
        if (layer.R_ == 0) continue;
        if (dropout.threshold != 0) {
          keep_bits_of(layer.p_.first_row + m, rows, k, count, dropout, bits);
          const KeepRows kept{bits, ceil_div(count, kDropoutBlock) * kKeepWords};
          pack_tokens(F32{}, part, round_up(count, kLanes), mv, kept_memory, kept);
        } else if (whole == nullptr) {
          pack_tokens(F32{}, part, round_up(count, kLanes), mv, whole_memory);
          whole = whole_memory;
        }
        layer.shrink(panel, split, k, count, dropout.threshold != 0 ? kept_memory : whole);
      }
    }
  }

  void reduce(int64_t tile) {
    Layer* layer = layers_;
    for (; tile >= reductions(*layer); layer++) tile -= reductions(*layer);
    layer->reduce(tile);
  }

  void product(int64_t tile) {
    Layer* layer = layers_;
    for (int64_t chunks; tile >= (chunks = ceil_div(layer->N_, layer->chunk_)); layer++) {
      tile -= chunks;
    }
    layer->product(tile);
  }
};

}  // namespace fastlora::FASTLORA_ISA
