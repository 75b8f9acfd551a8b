#include "../linear/decode.h"
#include "../linear/fwd.h"

#include "../table.h"
#include "../weight/with_weight.h"

namespace fastlora {
namespace FASTLORA_ISA {

void lora_linear_fwd(LoraLinearFwd* layers, int64_t count, const ParallelFor& parallel) {
  if (layers->M == 0) return;
  with_weight(layers->weight, layers->x_dtype, [&](auto compute, auto* x, auto* source) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    using Source = std::remove_const_t<std::remove_pointer_t<decltype(source)>>;
    using Few = LinearDecode<decltype(compute), X, Source>;
    using Many = SharedFwd<decltype(compute), X, Source>;
    const auto operand = [](const LoraLinearFwd& p) {
      return Operand<Source>(p.weight, p.weight.quant.absmax);
    };
    bool few = true;
    for (int64_t i = 0; i < count; i++) {
      few = few && Few::serves(layers[i], operand(layers[i]).source);
    }
    for (int64_t i = 0; few && i < count; i++) {
      const LoraLinearFwd& p = layers[i];
      const Operand<Source> w = operand(p);
      Few(p, w.source, parallel)
          .run(static_cast<char*>(scratch(Scratch::shared, Few::shared_bytes(p))));
    }
    if (few) return;
    const int64_t tokens = min(layers->M, Many::tokens_at_a_time(*layers));
    const size_t bytes = Many::shared_bytes(layers, count, tokens);
    Many(layers, count, parallel).run(static_cast<char*>(scratch(Scratch::shared, bytes)), tokens);
  });
  trim_scratch(Scratch::shared);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
