#include "../linear/bwd.h"

#include "../runtime/table.h"
#include "../weight/with_weight.h"

namespace fastlora::FASTLORA_ISA {

// Without tokens every gradient of a parameter is zero.
static void clear(const LoraLinearBwd& p) {
  const auto fill = [](float* out, int64_t count) {
    for (int64_t i = 0; out && i < count; i++) out[i] = 0;
  };
  fill(p.dA, p.R * p.weight.K);
  fill(p.dB, p.R * p.weight.N);
  fill(p.dbias, p.weight.N);
}

void lora_linear_bwd(const LayersOf<LoraLinearBwd>& layers, const Machine& machine) {
  const LoraLinearBwd& first = *layers.data;
  if (first.M == 0) {
    for (int64_t i = 0; i < layers.count; i++) clear(layers.data[i]);
    return;
  }
  with_weight(first.weight, first.x_dtype, [&]<class Compute, class X, class Source>() {
    SharedBwd<Compute, X, Source>(layers, machine).run();
  });
  trim_scratch(Scratch::shared);
}

}  // namespace fastlora::FASTLORA_ISA
