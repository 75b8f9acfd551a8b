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
  const uint32_t* bits;
  int64_t words;
};

// Tokens in lanes: out[k][mv][kLanes] = block[token][k], zero past the block, k < padded (a multiple
// of 2 * kLanes). Dropped elements become zero.
template <class X>
static void pack_tokens(F32, const Block<X>& block, KeepRows kept, int64_t padded, int mv,
                        float* out) {
  for (int64_t k = 0; k < padded; k += kLanes) {
    for (int v = 0; v < mv; v++) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const int64_t token = v * kLanes + i;
        r[i] = zero();
        if (token < block.rows && k < block.count) {
          r[i] = load(block.data + token * block.ld + k, block.count - k);
          if (kept.bits) r[i] = keep(r[i], lane_bits(kept.bits + token * kept.words, k));
        }
      }
      transpose(r);
      for (int i = 0; i < kLanes; i++) store(out + ((k + i) * mv + v) * kLanes, r[i]);
    }
  }
}

// Columns in lanes: out[row][kPanel] = block[row][column], for at most kPanel columns, zero past them.
template <class X>
static void pack_columns(const Block<X>& block, KeepRows kept, int64_t first_column, float* out) {
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
template <class X>
static void pack_rows(F32, const Block<X>& block, int64_t padded, float* out, int64_t ld) {
  for (int64_t i = 0; i < block.rows; i++) {
    for (int64_t k = 0; k < padded; k += kLanes) {
      const Vec r = k < block.count ? load(block.data + i * block.ld + k, block.count - k) : zero();
      store(out + i * ld + k, r);
    }
  }
}

#if defined(FASTLORA_PAIRS)

template <class X>
static void pack_tokens(Bf16Pair, const Block<X>& block, int64_t padded, int mv, uint32_t* out) {
  for (int64_t k = 0; k < padded; k += 2 * kLanes) {
    for (int v = 0; v < mv; v++) {
      Pairs r[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const int64_t token = v * kLanes + i;
        const bool inside = token < block.rows && k < block.count;
        r[i] =
            inside ? load_pairs(block.data + token * block.ld + k, block.count - k) : zero_pairs();
      }
      transpose(r);
      for (int i = 0; i < kLanes; i++) {
        store_pairs(out + ((k / 2 + i) * mv + v) * kLanes, r[i]);
      }
    }
  }
}

template <class X>
static void pack_rows(Bf16Pair, const Block<X>& block, int64_t padded, uint32_t* out, int64_t ld) {
  for (int64_t i = 0; i < block.rows; i++) {
    for (int64_t k = 0; k < padded; k += 2 * kLanes) {
      const Pairs r = k < block.count ? load_pairs(block.data + i * block.ld + k, block.count - k)
                                      : zero_pairs();
      store_pairs(out + i * ld + k / 2, r);
    }
  }
}

#endif

template <class X>
static void pack_tokens(F32 compute, const Block<X>& block, int64_t padded, int mv, float* out) {
  pack_tokens(compute, block, KeepRows{nullptr, 0}, padded, mv, out);
}

}  // namespace fastlora::FASTLORA_ISA
