// dx = mask * dkept + (1 - scale * mask) * drest in one pass. The forward's mask is computed again.
#include "../dropout.h"
#include "../runtime/table.h"
#include "../runtime/tiles.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kTokens = 8;  // of a tile

template <class T>
struct DropoutBwd {
  const DoraDropoutBwd& p;

  void rows(int64_t tile) {
    const int64_t begin = tile * kTokens, end = min(p.M, begin + kTokens);
    const Vec missing = broadcast(missing_share(p.dropout));
    for (int64_t m = begin; m < end; m++) {
      const T* dkept = static_cast<const T*>(p.dkept) + m * p.lddkept;
      const T* drest = static_cast<const T*>(p.drest) + m * p.lddrest;
      T* dx = static_cast<T*>(p.dx) + m * p.K;
      for (int64_t block = 0; block * kDropoutBlock < p.K; block++) {
        uint32_t bits[kKeepWords];
        keep_bits(m, block, p.dropout, bits);
        const int64_t k = block * kDropoutBlock;
        for (int64_t j = 0; j < min(kDropoutBlock, p.K - k); j += kLanes) {
          const int64_t count = p.K - k - j;
          const uint32_t lanes = lane_bits(bits, j);
          const Vec whole = load(drest + k + j, count);
          const Vec held = fma(whole, missing, load(dkept + k + j, count));
          store(dx + k + j, add(keep(held, lanes), keep(whole, ~lanes)), count);
        }
      }
    }
  }
};

}  // namespace

void dora_dropout_bwd(const DoraDropoutBwd& p, const Machine& machine) {
  with_type(p.dtype, [&]<class T>() {
    DropoutBwd<T> kernel{p};
    for_each_tile(machine.parallel, &kernel, &DropoutBwd<T>::rows, ceil_div(p.M, kTokens), 4);
  });
}

}  // namespace fastlora::FASTLORA_ISA
