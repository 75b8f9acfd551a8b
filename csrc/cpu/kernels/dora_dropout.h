// What the forward and the backward of DoRA's dropout share: one pass over rows of [M, K].
#pragma once

#include "../dropout.h"
#include "../runtime/table.h"

namespace fastlora::FASTLORA_ISA {

// For each m, row(m) returns what is called for its columns as column(k, count, lanes): the vector that
// begins at column k, of which `count` are left, and the bits of its lanes that are kept.
template <class Row>
static void for_each_row(const ParallelFor& parallel, int64_t M, int64_t K, const Dropout& dropout,
                         const Row& row) {
  constexpr int64_t kTokens = 8;  // of a tile
  parallel.each_run(ceil_div(M, kTokens), 4, [&](int64_t begin, int64_t end) {
    const int64_t columns = K;  // a copy, which no store can change
    for (int64_t m = begin * kTokens; m < min(M, end * kTokens); m++) {
      const auto column = row(m);
      for (int64_t block = 0; block * kDropoutBlock < columns; block++) {
        uint32_t bits[kKeepWords];
        keep_bits(m, block, dropout, bits);
        const int64_t k = block * kDropoutBlock;
        for (int64_t j = 0; j < min(kDropoutBlock, columns - k); j += kLanes) {
          column(k + j, columns - k - j, lane_bits(bits, j));
        }
      }
    }
  });
}

}  // namespace fastlora::FASTLORA_ISA
