#include "../linear_bwd.h"

#include "../table.h"
#include "../with_weight.h"

namespace fastlora {
namespace FASTLORA_ISA {

// Without tokens every gradient of a parameter is zero.
static void clear(const LoraLinearBwd& p) {
  const auto fill = [](float* out, int64_t count) {
    for (int64_t i = 0; out && i < count; i++) out[i] = 0;
  };
  fill(p.dA, p.R * p.weight.K);
  fill(p.dB, p.R * p.weight.N);
  fill(p.dbias, p.weight.N);
}

void lora_linear_bwd(const LoraLinearBwd& p, const ParallelFor& parallel) {
  if (p.M == 0) return clear(p);
  const size_t statistics = absmax_bytes(p.weight);
  const auto run = [&](const float* absmax, char* memory, size_t* bytes) {
    with_weight(p.weight, p.x_dtype, absmax, [&](auto compute, auto* x, const auto& source) {
      using X = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
      using Kernel = LinearBwd<decltype(compute), X, std::decay_t<decltype(source)>>;
      if (bytes) {
        *bytes = Kernel::shared_bytes(p);
      } else {
        Kernel(p, source, parallel).run(memory);
      }
    });
  };
  size_t bytes = 0;
  run(nullptr, nullptr, &bytes);
  char* memory = static_cast<char*>(scratch(Scratch::shared, statistics + bytes));
  const float* absmax =
      p.dx ? plain_absmax(p.weight, parallel, reinterpret_cast<float*>(memory)) : nullptr;
  run(absmax, memory + statistics, nullptr);
  trim_scratch(Scratch::shared);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
