// 4-bit codes to fp32 or bf16, in registers.
//
// The sixteen code values times a block's absmax form a table, rounded once to the working dtype; each
// code is then one table look-up. Bit-exact with code[q] * absmax in fp32, rounded.
#pragma once

#include "../isa/pairs.h"

namespace fastlora::FASTLORA_ISA {

struct Statistics;

// A 4-bit weight [N, K].
struct FourBit {
  const uint8_t* packed;
  const float* code;
  const float* absmax;  // in fp32; null if only `statistics` has it, see with_absmax
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

#if defined(FASTLORA_PAIRS)

// The whole groups among `count` codes from flat element `begin` on, in 16 bits, as `decode` calls the
// sink. Returns how many codes these are: 0 unless `begin` is a multiple of kGroup.
//   make_table(absmax)   the sixteen scaled codes in 16 bits
//   ahead                asks for the bytes that are needed this many bytes later
template <class MakeTable, class Sink>
FASTLORA_INLINE int64_t decode_groups(const FourBit& w, int64_t begin, int64_t count, int64_t ahead,
                                      const MakeTable& make_table, const Sink& sink) {
  if (begin % kGroup != 0) return 0;
  int64_t i = 0;
  while (i + kGroup <= count) {
    const int64_t block = (begin + i) >> w.shift;
    const int64_t end = min(count, ((block + 1) << w.shift) - begin);
    const WordTable table = make_table(w.absmax[block]);
    for (; i + kGroup <= end; i += kGroup) {
      const uint8_t* q = w.packed + (begin + i) / 2;
      prefetch_once(q + ahead, kGroup / 2);
      const auto shifted = [&](int j, Pairs v) __attribute__((always_inline)) { sink(i + j, v); };
      decode_words(q, table, shifted);
    }
  }
  return i;
}

// Rows in bf16: sink(i, pairs) for every (2 kLanes)-th i as `decode` does.
template <class Sink>
FASTLORA_INLINE void decode_bf16(const FourBit& w, int64_t begin, int64_t count, int64_t ahead,
                                 const Sink& sink) {
  const auto table = [&](float absmax)
                         __attribute__((always_inline)) { return bf16_words(w.code, absmax); };
  for (int64_t i = decode_groups(w, begin, count, ahead, table, sink); i < count; i += kGroup) {
    float values[kGroup] = {};
    decode_any(w, begin + i, min(kGroup, count - i), values);
    for (int j = 0; j < kGroup; j += 2 * kLanes) {
      sink(i + j, narrow_pairs(load(values + j), load(values + j + kLanes)));
    }
  }
}

#endif

}  // namespace fastlora::FASTLORA_ISA
