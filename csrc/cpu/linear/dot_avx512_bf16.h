// Dot products with 4-bit rows that are never unpacked: AVX512-BF16 with VBMI.
#pragma once

#include "dot.h"

namespace fastlora::FASTLORA_ISA {

// 64 bytes hold 128 codes. As 16-bit words, shifted by 0, 4, 8 and 12, they index a table that is
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

}  // namespace fastlora::FASTLORA_ISA
