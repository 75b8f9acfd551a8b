// Activations as panels, the operand that is in vector lanes.
#pragma once

#include "../dropout.h"
#include "../isa/compute.h"

namespace fastlora::FASTLORA_ISA {

// A block of x: rows of tokens, `count` columns from `data` on.
template <class X>
struct Block {
  const X* data;
  int64_t ld;
  int64_t rows;
  int64_t count;
};

// Keep bits of a block, one row of `words` words a token, starting at the block's first column; null:
// everything is kept.
struct KeepRows {
  const uint32_t* bits = nullptr;
  int64_t words = 0;
};

// Tokens in lanes: out[k][mv][kLanes] = units of block[token], zero past the block, for `padded`
// elements (a multiple of 2 * kLanes). Dropped elements become zero, in fp32.
template <class Compute, class X>
static void pack_tokens(Compute, const Block<X>& block, int64_t padded, int mv,
                        typename Compute::Unit* out, KeepRows kept = {}) {
  constexpr int64_t kPer = Compute::kPerUnit;
  for (int64_t k = 0; k < padded; k += kPer * kLanes) {
    for (int v = 0; v < mv; v++) {
      typename Compute::Register r[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const int64_t token = v * kLanes + i;
        r[i] = Compute::nothing();
        if (token < block.rows && k < block.count) {
          r[i] = Compute::read(block.data + token * block.ld + k, block.count - k);
          if constexpr (kPer == 1) {
            if (kept.bits) r[i] = keep(r[i], lane_bits(kept.bits + token * kept.words, k));
          }
        }
      }
      transpose(r);
      for (int i = 0; i < kLanes; i++) {
        Compute::write(out + ((k / kPer + i) * mv + v) * kLanes, r[i]);
      }
    }
  }
}

// Columns in lanes: out[row][kPanel] = block[row][column], for at most kPanel columns, zero past them.
template <class X>
static void pack_columns(const Block<X>& block, float* out, KeepRows kept = {},
                         int64_t first_column = 0) {
  for (int64_t i = 0; i < block.rows; i++) {
    for (int v = 0; v < kPanelVectors; v++) {
      const int64_t k = v * kLanes;
      Vec r = zero();
      if (k < block.count) {
        r = load(block.data + i * block.ld + k, block.count - k);
        if (kept.bits) r = keep(r, lane_bits(kept.bits + i * kept.words, first_column + k));
      }
      store(out + i * kPanel + k, r);
    }
  }
}

// Row-major units for the row operand: out[row][ld] = block[row][k], zero up to `padded` elements.
template <class Compute, class X>
static void pack_rows(Compute, const Block<X>& block, int64_t padded, typename Compute::Unit* out,
                      int64_t ld) {
  constexpr int64_t kPer = Compute::kPerUnit;
  for (int64_t i = 0; i < block.rows; i++) {
    for (int64_t k = 0; k < padded; k += kPer * kLanes) {
      const X* from = block.data + i * block.ld + k;
      Compute::write(out + i * ld + k / kPer,
                     k < block.count ? Compute::read(from, block.count - k) : Compute::nothing());
    }
  }
}

}  // namespace fastlora::FASTLORA_ISA
