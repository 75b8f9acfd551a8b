// csrc/cuda/ptx.cuh for a CPU: the same functions, over the emulation in simt.h. Which register of
// which lane holds which element is stated a second time in tests/test_cuda_emulation.py, from the
// PTX ISA's own words.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>

#include "../simt.h"

#define __global__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define FASTLORA_DEVICE inline
#define FASTLORA_HOST_DEVICE inline

namespace fastlora::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(16) Words4 {
  uint32_t w[4];
};

inline int thread_index() { return simt::thread_index(); }
inline int block_index() { return simt::block_index(); }

// ---- conversion --------------------------------------------------------------------------------

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return as_float(uint32_t{value.bits} << 16); }
inline float to_float(f16 value) {
  const uint32_t sign = uint32_t{value.bits} >> 15, exponent = value.bits >> 10 & 31;
  const uint32_t fraction = value.bits & 1023;
  if (exponent == 31) return as_float(sign << 31 | 0x7f800000u | fraction << 13);
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : as_float((exponent + 112) << 23 | fraction << 13);
  return sign != 0 ? -magnitude : magnitude;
}

inline uint16_t round_to(bf16, float value) {
  const uint32_t bits = as_bits(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_to(f16, float value) {
  if (value != value) return 0x7fff;
  const uint16_t sign = static_cast<uint16_t>(as_bits(value) >> 31 << 15);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // rounds past the largest number, 65504
  if (magnitude < 0x1p-14f) {                       // no hidden bit: multiples of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  }
  const uint32_t bits = as_bits(magnitude);
  return sign | static_cast<uint16_t>(((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10));
}

template <class T>
uint32_t pack(float low, float high) {
  return round_to(T{}, low) | uint32_t{round_to(T{}, high)} << 16;
}

// ---- arithmetic --------------------------------------------------------------------------------

// Compiled with -ffp-contract=off.
inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}

inline int log2_of(uint32_t a) { return 31 - __builtin_clz(a); }

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t{b} << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

inline uint32_t shift_left(uint32_t high, uint32_t low, int bits) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) << bits >> 32);
}

// ---- across lanes and warps --------------------------------------------------------------------

inline void block_barrier() { simt::block_barrier(); }

inline uint32_t ballot(bool predicate) {
  uint32_t value = predicate;
  simt::warp_collective("ballot", &value, [](void* const(&lanes)[simt::kWarp]) {
    uint32_t votes = 0;
    for (int i = 0; i < simt::kWarp; i++) votes |= *static_cast<uint32_t*>(lanes[i]) << i;
    for (void* lane : lanes) *static_cast<uint32_t*>(lane) = votes;
  });
  return value;
}

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  struct {
    uint32_t value;
    int mask;
  } operands{value, mask};
  simt::warp_collective("shuffle", &operands, [](void* const(&lanes)[simt::kWarp]) {
    using Operands = decltype(operands);
    uint32_t before[simt::kWarp];
    for (int i = 0; i < simt::kWarp; i++) before[i] = static_cast<Operands*>(lanes[i])->value;
    for (int i = 0; i < simt::kWarp; i++) {
      auto& lane = *static_cast<Operands*>(lanes[i]);
      lane.value = before[i ^ lane.mask];
    }
  });
  return operands.value;
}
inline float shuffle_xor(float value, int mask) {
  return as_float(shuffle_xor(as_bits(value), mask));
}

// ---- memory ------------------------------------------------------------------------------------

inline Words2 load_once(const Words2* address) { return *address; }

// Not zero, as on GPUs that keep the first kilobyte for themselves.
constexpr uint32_t kSharedStart = 1024;
inline uint32_t shared_memory() { return kSharedStart; }

// `where` is the caller's place: lanes that come to it together execute one instruction.
using Where = std::source_location;
template <class T>
T load_shared(uint32_t address, const Where& where = Where::current()) {
  T value;
  simt::count_access(address - kSharedStart, sizeof(T), where);
  std::memcpy(&value, simt::shared(address - kSharedStart, sizeof(T), simt::Access::read),
              sizeof(T));
  return value;
}
template <class T>
void store_shared(uint32_t address, T value, const Where& where = Where::current()) {
  simt::count_access(address - kSharedStart, sizeof(T), where);
  std::memcpy(simt::shared(address - kSharedStart, sizeof(T), simt::Access::write), &value,
              sizeof(T));
}

inline void copy_async_word(uint32_t shared, const void* global, int bytes) {
  simt::copy_async(shared - kSharedStart, global, bytes, 4);
}
inline void copy_async(uint32_t shared, const void* global, int bytes) {
  simt::copy_async(shared - kSharedStart, global, bytes, 16);
}
inline void copy_async_commit() { simt::copy_async_commit(); }
template <int kLeft>
void copy_async_wait() {
  simt::copy_async_wait(kLeft);
}

// ---- matrices ----------------------------------------------------------------------------------

struct MatrixLoad {
  uint32_t address;
  uint32_t r[4];
};

template <bool kTransposed>
void execute_load(void* const (&lanes)[simt::kWarp]) {
  simt::counters().matrix_loads++;
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t element[8][8];
    uint32_t banks = 0;
    for (int row = 0; row < 8; row++) {
      const int lane = 8 * matrix + row;
      const uint32_t address = static_cast<MatrixLoad*>(lanes[lane])->address - kSharedStart;
      std::memcpy(element[row], simt::shared(address, 16, simt::Access::read, lane), 16);
      // Eight rows are read at once if each lies in another sixteen bytes of 128.
      const uint32_t bank = 1u << (address / 16 % 8);
      if (banks & bank) simt::counters().bank_conflicts++;
      banks |= bank;
    }
    for (int lane = 0; lane < simt::kWarp; lane++) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t first = kTransposed ? element[2 * t][g] : element[g][2 * t];
      const uint32_t second = kTransposed ? element[2 * t + 1][g] : element[g][2 * t + 1];
      static_cast<MatrixLoad*>(lanes[lane])->r[matrix] = first | second << 16;
    }
  }
}

template <bool kTransposed>
void load_matrices_as(uint32_t (&r)[4], uint32_t address) {
  MatrixLoad operands{address, {}};
  simt::warp_collective(kTransposed ? "ldmatrix.trans" : "ldmatrix", &operands,
                        execute_load<kTransposed>);
  std::memcpy(r, operands.r, sizeof r);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  load_matrices_as<false>(r, address);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  load_matrices_as<true>(r, address);
}

struct Product {
  float* d;
  uint32_t a[4], b[2];
};

template <class T>
void execute_product(void* const (&lanes)[simt::kWarp]) {
  simt::counters().matrix_products++;
  float a[16][16], b[16][8];
  const auto half = [](uint32_t word, int which) {
    return to_float(T{static_cast<uint16_t>(word >> (16 * which))});
  };
  for (int lane = 0; lane < simt::kWarp; lane++) {
    const auto& p = *static_cast<Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; i++) {
      a[g][2 * t + i] = half(p.a[0], i);
      a[g + 8][2 * t + i] = half(p.a[1], i);
      a[g][2 * t + 8 + i] = half(p.a[2], i);
      a[g + 8][2 * t + 8 + i] = half(p.a[3], i);
      b[2 * t + i][g] = half(p.b[0], i);
      b[2 * t + 8 + i][g] = half(p.b[1], i);
    }
  }
  for (int lane = 0; lane < simt::kWarp; lane++) {
    const int g = lane / 4, t = lane % 4;
    float* d = static_cast<Product*>(lanes[lane])->d;
    for (int i = 0; i < 4; i++) {
      double sum = d[i];
      for (int k = 0; k < 16; k++) {
        sum +=
            static_cast<double>(a[g + 8 * (i / 2)][k]) * static_cast<double>(b[k][2 * t + i % 2]);
      }
      d[i] = static_cast<float>(sum);
    }
  }
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product operands{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  simt::warp_collective("mma", &operands, execute_product<T>);
}

}  // namespace fastlora::cuda
