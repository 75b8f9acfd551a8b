#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

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
#endif

namespace {

struct Level {
  const Kernels* table;
  bool (*runs)();
};

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
  return "scalar avx2 avx512 avx512_bf16";
#else
  return "scalar";
#endif
}

}  // namespace fastlora
