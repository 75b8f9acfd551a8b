// Philox4x32-7, the counter-based generator behind dropout, and the map from (m, k) to random bits.
//
// J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
//
// Element (m, k) lies in pair q = (k % 128) / 2 of block k / 128. Its 16 bits are half k % 2 (0: the
// low half) of output word q / 16 for counter (q % 16, k / 128, low(m), high(m)) and the seed as key.
// It is kept where these bits, as an unsigned integer, are >= round(65536 p). Sixteen neighbouring
// counters give 128 neighbouring elements of a row.
#pragma once

#include <cstdint>

namespace fastlora {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kDropoutBlock = 128;  // elements of a row made by sixteen counters

}  // namespace fastlora
