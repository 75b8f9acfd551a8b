#include "../linear/decode.h"
#include "../linear/fwd.h"

#include "../runtime/table.h"
#include "../weight/with_weight.h"

namespace fastlora::FASTLORA_ISA {

void lora_linear_fwd(const LayersOf<LoraLinearFwd>& layers, const Machine& machine) {
  const LoraLinearFwd& first = *layers.data;
  if (first.M == 0) return;
  with_weight(first.weight, first.x_dtype, [&]<class Compute, class X, class Source>() {
    using Few = LinearDecode<Compute, X, Source>;
    using Many = SharedFwd<Compute, X, Source>;
    const auto operand = [](const LoraLinearFwd& p) {
      return Operand<Source>(p.weight, p.weight.quant.absmax);
    };
    bool few = true;
    for (int64_t i = 0; i < layers.count; i++) {
      few = few && Few::serves(layers.data[i], operand(layers.data[i]).source);
    }
    for (int64_t i = 0; few && i < layers.count; i++) {
      const LoraLinearFwd& p = layers.data[i];
      const Operand<Source> w = operand(p);
      Few(p, w.source, machine.parallel).run();
    }
    if (!few) Many(layers, machine).run();
  });
  trim_scratch(Scratch::shared);
}

}  // namespace fastlora::FASTLORA_ISA
