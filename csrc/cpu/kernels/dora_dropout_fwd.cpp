// kept = mask * x and rest = x - scale * mask * x, in one pass over x: the two inputs of DoRA's products
// with W, which add up to x.
#include "../dropout.h"
#include "../runtime/table.h"
#include "../runtime/tiles.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kTokens = 8;  // of a tile

template <class T>
struct DropoutFwd {
  const DoraDropoutFwd& p;

  void rows(int64_t tile) {
    const int64_t begin = tile * kTokens, end = min(p.M, begin + kTokens);
    const Vec missing = broadcast(missing_share(p.dropout));
    for (int64_t m = begin; m < end; m++) {
      const T* x = static_cast<const T*>(p.x) + m * p.ldx;
      T* kept = static_cast<T*>(p.kept) + m * p.K;
      T* rest = static_cast<T*>(p.rest) + m * p.K;
      for (int64_t block = 0; block * kDropoutBlock < p.K; block++) {
        uint32_t bits[kKeepWords];
        keep_bits(m, block, p.dropout, bits);
        const int64_t k = block * kDropoutBlock;
        for (int64_t j = 0; j < min(kDropoutBlock, p.K - k); j += kLanes) {
          const int64_t count = p.K - k - j;
          const uint32_t lanes = lane_bits(bits, j);
          const Vec v = load(x + k + j, count), held = keep(v, lanes);
          store(kept + k + j, held, count);
          store(rest + k + j, add(mul(held, missing), keep(v, ~lanes)), count);
        }
      }
    }
  }
};

}  // namespace

void dora_dropout_fwd(const DoraDropoutFwd& p, const Machine& machine) {
  with_type(p.dtype, [&]<class T>() {
    DropoutFwd<T> kernel{p};
    for_each_tile(machine.parallel, &kernel, &DropoutFwd<T>::rows, ceil_div(p.M, kTokens), 4);
  });
}

}  // namespace fastlora::FASTLORA_ISA
