// The tile registers of AMX, eight of at most 16 rows x 64 bytes: the few instructions that amx.cpp
// uses. tests/csrc/amx_emulated.cpp has the same functions in plain code.
#pragma once

#include <cstdint>

namespace fastlora::FASTLORA_ISA::tiles {

// What LDTILECFG reads. Tiles of no rows may not be used.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64, "the processor reads 64 bytes");

#if !defined(FASTLORA_AMX_EMULATED)

#define FASTLORA_TILE static inline __attribute__((always_inline))

// Assembly, since the intrinsics do not take a tile number from a template. Sets all tiles to zero.
FASTLORA_TILE void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
// Without it, the system saves 8 KiB at each switch of threads.
FASTLORA_TILE void release() { asm volatile("tilerelease"); }
template <int T>
FASTLORA_TILE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// Rows lie `stride` bytes apart.
template <int T>
FASTLORA_TILE void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
FASTLORA_TILE void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// C[m][n] += sum over k of A[m][2k] B[k][2n] + A[m][2k + 1] B[k][2n + 1], A and B bf16, C fp32.
template <int C, int A, int B>
FASTLORA_TILE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#undef FASTLORA_TILE

#endif

}  // namespace fastlora::FASTLORA_ISA::tiles
