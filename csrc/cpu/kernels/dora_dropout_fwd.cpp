// kept = mask * x and rest = x - scale * mask * x, in one pass over x: the two inputs of DoRA's products
// with W, which add up to x.
#include "dora_dropout.h"

namespace fastlora::FASTLORA_ISA {

void dora_dropout_fwd(const DoraDropoutFwd& p, const Machine& machine) {
  const Vec missing = broadcast(missing_share(p.dropout));
  with_type(p.dtype, [&]<class T>() {
    for_each_row(machine.parallel, p.M, p.K, p.dropout, [&](int64_t m) {
      const T* x = static_cast<const T*>(p.x) + m * p.ldx;
      T* kept = static_cast<T*>(p.kept) + m * p.K;
      T* rest = static_cast<T*>(p.rest) + m * p.K;
      return [=](int64_t k, int64_t count, uint32_t lanes) __attribute__((always_inline)) {
        const Vec v = load(x + k, count), held = keep(v, lanes);
        store(kept + k, held, count);
        store(rest + k, add(mul(held, missing), keep(v, ~lanes)), count);
      };
    });
  });
}

}  // namespace fastlora::FASTLORA_ISA
