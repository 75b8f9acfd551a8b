// Random bits of dropout, from the seed: Philox4x32-7 and the map of common/philox.h.
#pragma once

#include "common/params.h"
#include "common/philox.h"
#include "cuda/ptx.cuh"

namespace fastlora::cuda {

// Row m, 128-element block `block`, counter `lane` (0 to 15): word w holds the bits of elements
// 128 block + 32 w + 2 lane (lower half) and the next one (upper half).
FASTLORA_DEVICE Words4 random_words(int64_t m, int64_t block, int lane, const Dropout& dropout) {
  uint32_t c0 = static_cast<uint32_t>(lane), c1 = static_cast<uint32_t>(block);
  uint32_t c2 = static_cast<uint32_t>(m), c3 = static_cast<uint32_t>(m >> 32);
  uint32_t k0 = dropout.key[0], k1 = dropout.key[1];
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; round++) {
    const uint32_t high0 = high_product(c0, kPhiloxM0), low0 = c0 * kPhiloxM0;
    const uint32_t high1 = high_product(c2, kPhiloxM1), low1 = c2 * kPhiloxM1;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

FASTLORA_DEVICE bool keeps_even(uint32_t word, const Dropout& dropout) {
  return (word & 0xffff) >= dropout.threshold;
}
FASTLORA_DEVICE bool keeps_odd(uint32_t word, const Dropout& dropout) {
  return (word >> 16) >= dropout.threshold;
}

}  // namespace fastlora::cuda
