// Reading a 4-bit weight: absmax, plain or nested, and eight codes at a time to 16-bit numbers.
#pragma once

#include "common/params.h"
#include "cuda/ptx.cuh"

namespace fastlora::cuda {

// A value of any dtype, as fp32.
FASTLORA_DEVICE float load(const void* values, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(values)[i];
    case DType::bf16:
      return to_float(static_cast<const bf16*>(values)[i]);
    default:
      return to_float(static_cast<const f16*>(values)[i]);
  }
}

FASTLORA_DEVICE void store(void* values, DType dtype, int64_t i, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(values)[i] = value;
  } else {
    const uint32_t bits = dtype == DType::bf16 ? pack<bf16>(value, 0.0f) : pack<f16>(value, 0.0f);
    static_cast<uint16_t*>(values)[i] = static_cast<uint16_t>(bits);
  }
}

constexpr int kCodes = 16, kNestedCodes = 256;
constexpr int kLog2NestedBlock = 8;  // of the absmax values that share one nested_absmax

// The tables of a weight in shared memory: 16 code values, 256 of the nested absmax, its offset.
constexpr int kTableEntries = kCodes + kNestedCodes + 1;
constexpr uint32_t kTableBytes = (kTableEntries * sizeof(float) + 15) / 16 * 16;

FASTLORA_DEVICE void copy_tables(uint32_t tables, const Quant4bit& quant, int thread, int threads) {
  const int entries = quant.nested_absmax == nullptr ? kCodes : kTableEntries;
  for (int i = thread; i < entries; i += threads) {
    const float value = i < kCodes                  ? quant.code[i]
                        : i < kCodes + kNestedCodes ? quant.nested_code[i - kCodes]
                                                    : *quant.nested_offset;
    store_shared<float>(tables + 4 * i, value);
  }
}

// absmax as it comes from memory. Loaded early and put together late, so that the loads' latency
// passes unseen.
struct Absmax {
  float scale;
  uint32_t code;
};

template <typename Index>
FASTLORA_DEVICE Absmax absmax_of_block(const Quant4bit& quant, Index block) {
  if (quant.nested_absmax == nullptr) return {quant.absmax[block], 0};
  return {quant.nested_absmax[block >> kLog2NestedBlock], quant.absmax_8bit[block]};
}

// Of the block that code `i` lies in.
FASTLORA_DEVICE Absmax load_absmax(const Quant4bit& quant, int64_t i) {
  return absmax_of_block(quant, i >> log2_of(static_cast<uint32_t>(quant.blocksize)));
}

// Of the block that piece i lies in, W cut into pieces of 2^log2_piece codes: where 32 bits number
// them all, addresses take half of the arithmetic.
FASTLORA_DEVICE Absmax load_piece_absmax(const Quant4bit& quant, uint32_t i, int log2_piece) {
  return absmax_of_block(quant,
                         i >> (log2_of(static_cast<uint32_t>(quant.blocksize)) - log2_piece));
}

FASTLORA_DEVICE float absmax_offset(uint32_t tables) {
  return load_shared<float>(tables + 4 * (kCodes + kNestedCodes));
}

// Product and sum are rounded one after the other, as in reference.dequantize_absmax.
FASTLORA_DEVICE float absmax_value(const Quant4bit& quant, Absmax a, uint32_t tables,
                                   float offset) {
  if (quant.nested_absmax == nullptr) return a.scale;
  const float code = load_shared<float>(tables + 4 * (kCodes + a.code));
  return add(multiply(code, a.scale), offset);
}
FASTLORA_DEVICE float absmax_value(const Quant4bit& quant, Absmax a, uint32_t tables) {
  const bool nested = quant.nested_absmax != nullptr;
  return absmax_value(quant, a, tables, nested ? absmax_offset(tables) : 0.0f);
}

// The 16 values code * absmax of one block, rounded once to T, their lower bytes in low[], their
// upper ones in high[]: what decode() looks up with byte permutes.
struct Planes {
  uint32_t low[4], high[4];
};

template <class T>
FASTLORA_DEVICE Planes make_planes(uint32_t tables, float absmax) {
  Planes planes;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const Words4 code = load_shared<Words4>(tables + 16 * i);
    const uint32_t first =
        pack<T>(multiply(as_float(code.w[0]), absmax), multiply(as_float(code.w[1]), absmax));
    const uint32_t second =
        pack<T>(multiply(as_float(code.w[2]), absmax), multiply(as_float(code.w[3]), absmax));
    planes.low[i] = permute(first, second, 0x6420);
    planes.high[i] = permute(first, second, 0x7531);
  }
  return planes;
}

// The eight codes of four packed bytes, high nibble first, as eight numbers in order.
//
// A permute looks up four nibbles among eight bytes; its selectors have three bits. So codes below
// and above 8 are looked up apart, and a third permute picks by the fourth bit.
FASTLORA_DEVICE Words4 decode(uint32_t packed, const Planes& planes) {
  const uint32_t three_bits = packed & 0x77777777u;
  const uint32_t fourth_bit = (packed >> 1 & 0x44444444u) | 0x32103210u;
  Words4 out;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t which = three_bits >> (16 * half), pick = fourth_bit >> (16 * half);
    const auto look_up = [&](const uint32_t (&plane)[4]) {
      return permute(permute(plane[0], plane[1], which), permute(plane[2], plane[3], which), pick);
    };
    const uint32_t low = look_up(planes.low), high = look_up(planes.high);
    out.w[2 * half] = permute(low, high, 0x4051);  // byte 0's high nibble, then its low one
    out.w[2 * half + 1] = permute(low, high, 0x6273);
  }
  return out;
}

}  // namespace fastlora::cuda
