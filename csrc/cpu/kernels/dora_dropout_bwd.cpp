// dx = mask * dkept + (1 - scale * mask) * drest in one pass. The forward's mask is computed again.
#include "dora_dropout.h"

namespace fastlora::FASTLORA_ISA {

void dora_dropout_bwd(const DoraDropoutBwd& p, const Machine& machine) {
  const Vec missing = broadcast(missing_share(p.dropout));
  with_type(p.dtype, [&]<class T>() {
    for_each_row(machine.parallel, p.M, p.K, p.dropout, [&](int64_t m) {
      const T* dkept = static_cast<const T*>(p.dkept) + m * p.lddkept;
      const T* drest = static_cast<const T*>(p.drest) + m * p.lddrest;
      T* dx = static_cast<T*>(p.dx) + m * p.K;
      return [=](int64_t k, int64_t count, uint32_t lanes) __attribute__((always_inline)) {
        const Vec whole = load(drest + k, count);
        const Vec held = fma(whole, missing, load(dkept + k, count));
        store(dx + k, add(keep(held, lanes), keep(whole, ~lanes)), count);
      };
    });
  });
}

}  // namespace fastlora::FASTLORA_ISA
