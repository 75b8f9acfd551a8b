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

namespace scalar {
extern const Kernels kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512_bf16 {
extern const Kernels kTable;
}
namespace amx {
extern const Kernels kTable;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kTable;
}
namespace neon_bf16 {
extern const Kernels kTable;
}
#endif

namespace {

struct Level {
  const Kernels* table;
  bool (*runs)();
};

#if defined(__x86_64__)
// Whether the processor has AMX for bf16, and the system lets this process use it: Linux wants to be
// asked first, since the registers are large.
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
const Level kLevels[] = {
    {&scalar::kTable, [] { return true; }},
#if defined(__x86_64__)
    {&avx2::kTable,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
     }},
    {&avx512::kTable,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {&avx512_bf16::kTable,
     [] { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"); }},
    {&amx::kTable, may_use_amx},
#elif defined(__aarch64__)
    {&neon::kTable, [] { return true; }},  // part of the architecture
    {&neon_bf16::kTable,
     [] {
#if defined(__linux__)
       constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
       return (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
       return false;
#endif
     }},
#endif
};

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* asked = std::getenv("FASTLORA_CPU_ISA");
  const bool any = asked == nullptr || *asked == '\0';
  const Kernels* best = nullptr;
  for (const Level& level : kLevels) {
    if (!level.runs()) break;
    best = level.table;
    if (!any && std::strcmp(best->isa, asked) == 0) return *best;
  }
  if (!any) {
    throw std::runtime_error(std::string("FASTLORA_CPU_ISA must be one of ") + compiled_isas() +
                             ", and no higher than this CPU's " + best->isa + ", got " + asked);
  }
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* compiled_isas() {
#if defined(__x86_64__)
  return "scalar avx2 avx512 avx512_bf16 amx";
#elif defined(__aarch64__)
  return "scalar neon neon_bf16";
#else
  return "scalar";
#endif
}

}  // namespace fastlora
