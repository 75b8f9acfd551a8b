// Any processor: four lanes, in whatever registers the compiler has for them.
#pragma once

#include "elements.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kLanes = 4;
constexpr int kPanelVectors = 2;
constexpr int kRegisters = 16;
// Rows of a tile by its width in vectors: as many accumulators as fit beside the panel's registers.
constexpr int kTileRows[kPanelVectors + 1] = {0, 12, 6};

}  // namespace fastlora::FASTLORA_ISA

#include "compiler_vectors.h"

namespace fastlora::FASTLORA_ISA {

FASTLORA_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

template <class T>
FASTLORA_INLINE Vec load(const T* p) {
  Vec v;
  for (int i = 0; i < kLanes; i++) v[i] = to_float(p[i]);
  return v;
}
template <class T>
FASTLORA_INLINE void store(T* p, Vec v) {
  for (int i = 0; i < kLanes; i++) from_float(v[i], p[i]);
}

// r[i][j] <-> r[j][i], for kLanes x kLanes lanes.
FASTLORA_INLINE void transpose(Vec r[kLanes]) {
  Vec t[kLanes];
  for (int i = 0; i < kLanes; i++) {
    for (int j = 0; j < kLanes; j++) t[i][j] = r[j][i];
  }
  for (int i = 0; i < kLanes; i++) r[i] = t[i];
}

}  // namespace fastlora::FASTLORA_ISA

#include "partial.h"

namespace fastlora::FASTLORA_ISA {

// ---- 4-bit codes: the sixteen values times absmax, and the look-up of kGroup codes ----------------

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

}  // namespace fastlora::FASTLORA_ISA
