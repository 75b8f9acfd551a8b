// 4-bit codes to fp32 or bf16, in registers.
//
// The sixteen code values times a block's absmax form a table, rounded once to the working dtype; each
// code is then one table look-up. Bit-exact with code[q] * absmax in fp32, rounded.
#pragma once

#include "../isa/pairs.h"

namespace fastlora {
namespace FASTLORA_ISA {

constexpr int kGroup = 32;  // codes decoded at a time: no block is smaller, so one table serves

struct Statistics;

// A 4-bit weight [N, K].
struct FourBit {
  const uint8_t* packed;
  const float* code;
  const float* absmax;  // in fp32; null while it stands in `statistics` alone, see with_absmax
  int64_t K;
  int shift;                     // log2(blocksize)
  DType round;                   // dtype of the decoded weight
  const Statistics* statistics;  // where nested absmax comes from, see absmax.h
};

FASTLORA_INLINE int log2_of(int64_t power) { return __builtin_ctzll(static_cast<uint64_t>(power)); }

// Asks for a cache line that is needed soon; the address may lie past the weight.
FASTLORA_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// The same for a loop that reads `step` bytes at a time: asks once for each line.
FASTLORA_INLINE void prefetch_once(const void* address, uintptr_t step) {
  if (reinterpret_cast<uintptr_t>(address) % 64 < step) prefetch(address);
}

#if defined(__AVX512F__)

struct Table {
  Vec values;
};
FASTLORA_INLINE Table make_table(const float* code, float absmax, DType round) {
  return {round_to(mul(load(code), broadcast(absmax)), round)};
}
// Two vectors of 16 from 16 bytes.
template <class Sink>
FASTLORA_INLINE void decode_group(const uint8_t* q, const Table& table, const Sink& sink) {
  for (int half = 0; half < 2; half++) {
    const __m512i byte =
        _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + 8 * half)));
    // The even code lies in the high nibble; the look-up ignores all but four bits of a lane.
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
    sink(16 * half, _mm512_permutexvar_ps(index, table.values));
  }
}

#elif defined(__AVX2__)

struct Table {
  Vec low, high;
};
FASTLORA_INLINE Table make_table(const float* code, float absmax, DType round) {
  return {round_to(mul(load(code), broadcast(absmax)), round),
          round_to(mul(load(code + 8), broadcast(absmax)), round)};
}
template <class Sink>
FASTLORA_INLINE void decode_group(const uint8_t* q, const Table& table, const Sink& sink) {
  const __m256i shift = _mm256_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0);
  const __m128i spread = _mm_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, -1, -1, -1, -1, -1, -1, -1, -1);
  for (int quarter = 0; quarter < 4; quarter++) {
    int32_t four;
    memcpy(&four, q + 4 * quarter, 4);
    const __m128i bytes = _mm_shuffle_epi8(_mm_cvtsi32_si128(four), spread);
    const __m256i index = _mm256_srlv_epi32(_mm256_cvtepu8_epi32(bytes), shift);
    // The look-up reads three bits; the fourth picks the table's half.
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    sink(8 * quarter, _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                                       _mm256_permutevar8x32_ps(table.high, index), upper));
  }
}

#elif defined(FASTLORA_NEON)

// The sixteen floats as four planes of bytes: a look-up finds bytes.
struct Table {
  uint8x16x4_t planes;
};
FASTLORA_INLINE Table make_table(const float* code, float absmax, DType round) {
  float values[16];
  for (int i = 0; i < 16; i += kLanes) {
    store(values + i, round_to(mul(load(code + i), broadcast(absmax)), round));
  }
  return {vld4q_u8(reinterpret_cast<const uint8_t*>(values))};
}
// Sixteen codes from each half of 16 bytes, one a byte; the even one lies in the high nibble.
FASTLORA_INLINE uint8x16x2_t split_codes(const uint8_t* q) {
  const uint8x16_t bytes = vld1q_u8(q);
  return vzipq_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15)));
}
template <class Sink>
FASTLORA_INLINE void decode_group(const uint8_t* q, const Table& table, const Sink& sink) {
  const uint8x16x2_t codes = split_codes(q);
  for (int half = 0; half < 2; half++) {
    uint8x16_t byte[4];
    for (int i = 0; i < 4; i++) byte[i] = vqtbl1q_u8(table.planes.val[i], codes.val[half]);
    const uint8x16x2_t low = vzipq_u8(byte[0], byte[1]), high = vzipq_u8(byte[2], byte[3]);
    for (int i = 0; i < 2; i++) {
      const uint16x8x2_t words =
          vzipq_u16(vreinterpretq_u16_u8(low.val[i]), vreinterpretq_u16_u8(high.val[i]));
      sink(16 * half + 8 * i, vreinterpretq_f32_u16(words.val[0]));
      sink(16 * half + 8 * i + kLanes, vreinterpretq_f32_u16(words.val[1]));
    }
  }
}

#else

struct Table {
  float values[16];
};
FASTLORA_INLINE Table make_table(const float* code, float absmax, DType round) {
  Table table;
  for (int i = 0; i < 16; i += kLanes) {
    store(table.values + i, round_to(mul(load(code + i), broadcast(absmax)), round));
  }
  return table;
}
template <class Sink>
FASTLORA_INLINE void decode_group(const uint8_t* q, const Table& table, const Sink& sink) {
  float values[kGroup];
  for (int i = 0; i < kGroup / 2; i++) {
    values[2 * i] = table.values[q[i] >> 4];
    values[2 * i + 1] = table.values[q[i] & 15];
  }
  for (int i = 0; i < kGroup; i += kLanes) sink(i, load(values + i));
}

#endif

// `count` codes from flat element `begin` on, one after the other, for any alignment.
FASTLORA_INLINE void decode_any(const FourBit& w, int64_t begin, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) {
    const int64_t e = begin + i;
    const uint8_t byte = w.packed[e >> 1];
    const float value = w.code[e & 1 ? byte & 15 : byte >> 4] * w.absmax[e >> w.shift];
    if (w.round == DType::f32) {
      out[i] = value;
    } else if (w.round == DType::bf16) {
      bf16 rounded;
      from_float(value, rounded);
      out[i] = to_float(rounded);
    } else {
      f16 rounded;
      from_float(value, rounded);
      out[i] = to_float(rounded);
    }
  }
}

// Calls sink(i, vector) for every kLanes-th i of the `count` codes from flat element `begin` on; up to
// the next multiple of kGroup, with zeros past `count`.
template <class Sink>
FASTLORA_INLINE void decode(const FourBit& w, int64_t begin, int64_t count, const Sink& sink) {
  int64_t i = 0;
  if (begin % kGroup == 0) {
    while (i + kGroup <= count) {
      const int64_t block = (begin + i) >> w.shift;
      const int64_t end = min(count, ((block + 1) << w.shift) - begin);
      const Table table = make_table(w.code, w.absmax[block], w.round);
      for (; i + kGroup <= end; i += kGroup) {
        const auto shifted = [&](int j, Vec v) __attribute__((always_inline)) { sink(i + j, v); };
        decode_group(w.packed + (begin + i) / 2, table, shifted);
      }
    }
  }
  for (; i < count; i += kGroup) {
    float values[kGroup] = {};
    decode_any(w, begin + i, min(kGroup, count - i), values);
    for (int j = 0; j < kGroup; j += kLanes) sink(i + j, load(values + j));
  }
}

#if defined(__AVX512BF16__)

// The code times absmax_low and, in the upper sixteen of 32 bf16, times absmax_high.
FASTLORA_INLINE __m512i bf16_table(const float* code, float absmax_low, float absmax_high) {
  const Vec values = load(code);
  return (__m512i)_mm512_cvtne2ps_pbh(mul(values, broadcast(absmax_high)),
                                      mul(values, broadcast(absmax_low)));
}

// The whole groups among `count` codes from flat element `begin` on, in 16 bits: sink(i, 32 values).
// Returns how many codes these are: 0 unless `begin` is a multiple of kGroup.
//   make_table(absmax)   the sixteen scaled codes in 16 bits
//   ahead                asks for the bytes that are needed this many bytes later
template <class MakeTable, class Sink>
FASTLORA_INLINE int64_t decode_words(const FourBit& w, int64_t begin, int64_t count, int64_t ahead,
                                     const MakeTable& make_table, const Sink& sink) {
  if (begin % kGroup != 0) return 0;
  const __m512i shift = _mm512_set1_epi32(4);  // even elements: the high nibble
  const __m512i spread =
      _mm512_setr_epi32(0x00000000, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505,
                        0x06060606, 0x07070707, 0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b,
                        0x0c0c0c0c, 0x0d0d0d0d, 0x0e0e0e0e, 0x0f0f0f0f);
  int64_t i = 0;
  while (i + kGroup <= count) {
    const int64_t block = (begin + i) >> w.shift;
    const int64_t end = min(count, ((block + 1) << w.shift) - begin);
    // Both halves alike: a look-up reads five bits, the fifth of which is noise here.
    const __m512i table = _mm512_broadcast_i64x4(make_table(w.absmax[block]));
    for (; i + kGroup <= end; i += kGroup) {
      const uint8_t* q = w.packed + (begin + i) / 2;
      prefetch_once(q + ahead, kGroup / 2);
      const __m512i bytes =
          _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
      const __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi8(spread, bytes), shift);
      sink(i, _mm512_permutexvar_epi16(index, table));
    }
  }
  return i;
}

// Rows in bf16: sink(i, 32 values) as `decode` does; asks for the bytes that are needed `ahead` bytes
// later.
template <class Sink>
FASTLORA_INLINE void decode_bf16(const FourBit& w, int64_t begin, int64_t count, int64_t ahead,
                                 const Sink& sink) {
  const auto table = [&](float absmax) __attribute__((always_inline)) {
    return (__m256i)_mm512_cvtneps_pbh(mul(load(w.code), broadcast(absmax)));
  };
  for (int64_t i = decode_words(w, begin, count, ahead, table, sink); i < count; i += kGroup) {
    float values[kGroup] = {};
    decode_any(w, begin + i, min(kGroup, count - i), values);
    sink(i, (__m512i)_mm512_cvtne2ps_pbh(load(values + kLanes), load(values)));
  }
}

// 32 columns of rows a and b as pairs (a, b), in two vectors of 16 lanes in natural order. A table of
// 32 values serves both rows: the fifth bit of the index tells the row.
FASTLORA_INLINE void decode_pairs(const uint8_t* a, const uint8_t* b, __m512i table,
                                  uint32_t* out) {
  const __m512i bytes = _mm512_castsi256_si512(
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)a)),
                              _mm_loadu_si128((const __m128i*)b), 1));
  // Lane j of vector v: byte 8 v + j / 2 of row a in the low word, of row b in the high word.
  const __m512i spread =
      _mm512_setr_epi32(0x10100000, 0x10100000, 0x11110101, 0x11110101, 0x12120202, 0x12120202,
                        0x13130303, 0x13130303, 0x14140404, 0x14140404, 0x15150505, 0x15150505,
                        0x16160606, 0x16160606, 0x17170707, 0x17170707);
  const __m512i shift = _mm512_set1_epi64(0x0000000000040004);  // even columns: the high nibble
  const __m512i nibble = _mm512_set1_epi32(0x000f000f), row_b = _mm512_set1_epi32(0x00100000);
  for (int v = 0; v < 2; v++) {
    const __m512i pick = _mm512_add_epi8(spread, _mm512_set1_epi8(static_cast<char>(8 * v)));
    __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi8(pick, bytes), shift);
    index = _mm512_ternarylogic_epi32(index, nibble, row_b, 0xea);  // (index & nibble) | row_b
    _mm512_storeu_si512(out + v * kLanes, _mm512_permutexvar_epi16(index, table));
  }
}

#elif defined(FASTLORA_PAIRS)

// Rows in bf16: sink(i, 8 values) for every eighth i as `decode` does; asks for the bytes that are
// needed `ahead` bytes later.
template <class Sink>
FASTLORA_INLINE void decode_bf16(const FourBit& w, int64_t begin, int64_t count, int64_t ahead,
                                 const Sink& sink) {
  int64_t i = 0;
  while (begin % kGroup == 0 && i + kGroup <= count) {
    const int64_t block = (begin + i) >> w.shift;
    const int64_t end = min(count, ((block + 1) << w.shift) - begin);
    const Vec absmax = broadcast(w.absmax[block]);
    uint32_t pairs[8];
    for (int j = 0; j < 8; j += kLanes) {
      store_pairs(pairs + j, narrow_pairs(mul(load(w.code + 2 * j), absmax),
                                          mul(load(w.code + 2 * j + kLanes), absmax)));
    }
    // Low and high bytes.
    const uint8x16x2_t table = vld2q_u8(reinterpret_cast<const uint8_t*>(pairs));
    for (; i + kGroup <= end; i += kGroup) {
      const uint8_t* q = w.packed + (begin + i) / 2;
      prefetch_once(q + ahead, kGroup / 2);
      const uint8x16x2_t codes = split_codes(q);
      for (int half = 0; half < 2; half++) {
        const uint8x16x2_t words = vzipq_u8(vqtbl1q_u8(table.val[0], codes.val[half]),
                                            vqtbl1q_u8(table.val[1], codes.val[half]));
        sink(i + 16 * half, vreinterpretq_u32_u8(words.val[0]));
        sink(i + 16 * half + 8, vreinterpretq_u32_u8(words.val[1]));
      }
    }
  }
  for (; i < count; i += kGroup) {
    float values[kGroup] = {};
    decode_any(w, begin + i, min(kGroup, count - i), values);
    for (int j = 0; j < kGroup; j += 2 * kLanes) {
      sink(i + j, narrow_pairs(load(values + j), load(values + j + kLanes)));
    }
  }
}

#endif

}  // namespace FASTLORA_ISA
}  // namespace fastlora
