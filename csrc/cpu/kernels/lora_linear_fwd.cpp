#include "../linear_decode.h"
#include "../linear_fwd.h"

#include "../table.h"
#include "../with_weight.h"

namespace fastlora {
namespace FASTLORA_ISA {

void lora_linear_fwd(const LoraLinearFwd& p, const ParallelFor& parallel) {
  if (p.M == 0) return;
  // Runs the kernel, or only asks how much memory it wants.
  const auto run = [&](char* memory, size_t* bytes) {
    with_weight(p.weight, p.x_dtype, p.weight.quant.absmax,
                [&](auto compute, auto* x, const auto& source) {
                  using X = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
                  using Source = std::decay_t<decltype(source)>;
                  using Few = LinearDecode<decltype(compute), X, Source>;
                  using Many = LinearFwd<decltype(compute), X, Source>;
                  const bool few = Few::serves(p, source);
                  const int64_t tokens = min(p.M, Many::tokens_at_a_time(p));
                  if (bytes) {
                    *bytes = few ? Few::shared_bytes(p) : Many::shared_bytes(p, tokens);
                  } else if (few) {
                    Few(p, source, parallel).run(memory);
                  } else {
                    Many(p, source, parallel).run(memory, tokens);
                  }
                });
  };
  size_t bytes = 0;
  run(nullptr, &bytes);
  run(static_cast<char*>(scratch(Scratch::shared, bytes)), nullptr);
  trim_scratch(Scratch::shared);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
