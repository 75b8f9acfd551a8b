#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "kernels.h"

namespace fastlora {

// What is compiled for each set: its kernels, or just the product of a matrix unit.
#define FASTLORA_KERNELS_OF(isa) \
  namespace isa {                \
  extern const Kernels kTable;   \
  }
FASTLORA_KERNELS_OF(scalar)
#if defined(__x86_64__)
FASTLORA_KERNELS_OF(avx2)
FASTLORA_KERNELS_OF(avx512)
FASTLORA_KERNELS_OF(avx512_bf16)
namespace amx {
void multiply(const TileProduct<uint32_t>& product);
}
#elif defined(__aarch64__)
FASTLORA_KERNELS_OF(neon)
FASTLORA_KERNELS_OF(neon_bf16)
#endif

namespace {

// For the caches of kReference in tile_sizes.cpp.
constexpr TileSizes sizes_for(int64_t lanes) {
  return {
      .decode_tokens = 8,
      .decode_rows = 32,
      .fwd_pack_bytes = 16 << 20,
      .fwd_shrink_columns = 256,
      .fwd_strip_rows = 48,
      .fwd_strip_bytes = 4096,
      .fwd_few_rows = 0,
      .bwd_token_block = 32,
      .bwd_shrink_columns = 512,
      .bwd_strip_columns = 128,
      .bwd_tokens = 512,
      .bwd_panel_units = 512,
      .bwd_few_tokens = 4 * lanes,
      .bwd_grad_tokens = 512,
  };
}

// Whole pairs of row tiles.
constexpr TileSizes amx_sizes() {
  TileSizes sizes = sizes_for(16);
  sizes.fwd_strip_rows = 64;
  sizes.fwd_few_rows = 32;
  return sizes;
}

#if defined(__x86_64__)
// Whether the processor has AMX for bf16, and the system lets this process use it: Linux must be asked
// first, since the registers are large.
bool may_use_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023,
                kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// From the plainest on; the last that this CPU runs is chosen.
//
// A new set is a row here, isa/<set>.h and its line in isa/simd.h (isa/pairs.h for one with products
// of bf16 pairs), and its flags in CMakeLists.txt.
constexpr Level kLevels[] = {
    {"scalar", &scalar::kTable, [] { return true; }, sizes_for(4), nullptr},
#if defined(__x86_64__)
    {"avx2", &avx2::kTable,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
     },
     sizes_for(8), nullptr},
    {"avx512", &avx512::kTable,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     sizes_for(16), nullptr},
    {"avx512_bf16", &avx512_bf16::kTable,
     [] { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"); },
     sizes_for(16), nullptr},
    {"amx", &avx512_bf16::kTable, may_use_amx, amx_sizes(), amx::multiply},
#elif defined(__aarch64__)
    {"neon", &neon::kTable, [] { return true; }, sizes_for(4),
     nullptr},  // part of the architecture
    {"neon_bf16", &neon_bf16::kTable,
     [] {
#if defined(__linux__)
       constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
       return (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
       return false;
#endif
     },
     sizes_for(4), nullptr},
#endif
};

const Level& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* asked = std::getenv("FASTLORA_CPU_ISA");
  const bool any = asked == nullptr || *asked == '\0';
  const Level* best = nullptr;
  for (const Level& level : kLevels) {
    if (!level.runs()) break;
    best = &level;
    if (!any && std::strcmp(level.isa, asked) == 0) return level;
  }
  if (!any) {
    throw std::runtime_error(std::string("FASTLORA_CPU_ISA must be one of ") + compiled_isas() +
                             ", and no higher than this CPU's " + best->isa + ", got " + asked);
  }
  return *best;
}

}  // namespace

const Level& kernels() {
  static const Level& chosen = choose();
  return chosen;
}

const Level* level_named(const char* isa) {
  for (const Level& level : kLevels) {
    if (std::strcmp(level.isa, isa) == 0) return &level;
  }
  return nullptr;
}

std::string compiled_isas() {
  std::string names;
  for (const Level& level : kLevels) {
    if (!names.empty()) names += ' ';
    names += level.isa;
  }
  return names;
}

}  // namespace fastlora
