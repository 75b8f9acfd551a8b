// Elements in bf16, fp16 and fp32, one at a time, for any instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../common/params.h"

#define FASTLORA_INLINE static inline __attribute__((always_inline))

namespace fastlora::FASTLORA_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// 4-bit codes decoded at a time. No block is smaller, so all of them have one absmax.
constexpr int kGroup = 32;

FASTLORA_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLORA_INLINE int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
FASTLORA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTLORA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

FASTLORA_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FASTLORA_INLINE float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
FASTLORA_INLINE float to_float(float x) { return x; }
FASTLORA_INLINE float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
FASTLORA_INLINE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  // 2^112 moves the exponent bias from 15 to 127; denormals come out exact.
  const float scaled = bits_float(magnitude << 13) * bits_float(0x77800000);
  return bits_float(sign | float_bits(scaled));
}
FASTLORA_INLINE void from_float(float x, float& out) { out = x; }
FASTLORA_INLINE void from_float(float x, bf16& out) {
  const uint32_t u = float_bits(x);
  out.bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
FASTLORA_INLINE void from_float(float x, f16& out) {
  const uint32_t u = float_bits(x), magnitude = u & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  if (magnitude > 0x7f800000) {
    out.bits = sign | 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    out.bits = sign | 0x7c00;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000) {
    // Below 2^-14 the result is a multiple of 2^-24: adding 0.5 rounds to that, ties to even.
    const float rounded = bits_float(magnitude) + 0.5f;
    out.bits = static_cast<uint16_t>(sign | (float_bits(rounded) - 0x3f000000));
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    out.bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
  }
}

}  // namespace fastlora::FASTLORA_ISA
