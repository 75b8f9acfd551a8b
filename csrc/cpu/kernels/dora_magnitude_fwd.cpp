// y = factor * z + rest in one pass, rounded once.
#include "../runtime/table.h"
#include "../runtime/tiles.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kTokens = 16;  // of a tile

template <class T, class Rest>
struct MagnitudeFwd {
  const DoraMagnitudeFwd& p;

  void rows(int64_t tile) {
    const int64_t begin = tile * kTokens, end = min(p.M, begin + kTokens);
    for (int64_t m = begin; m < end; m++) {
      const T* z = static_cast<const T*>(p.z) + m * p.ldz;
      const Rest* rest = static_cast<const Rest*>(p.rest) + m * p.ldrest;
      T* y = static_cast<T*>(p.y) + m * p.N;
      for (int64_t n = 0; n < p.N; n += kLanes) {
        const int64_t count = p.N - n;
        const Vec added = p.rest ? load(rest + n, count) : zero();
        store(y + n, fma(load(z + n, count), load(p.factor + n, count), added), count);
      }
    }
  }
};

}  // namespace

void dora_magnitude_fwd(const DoraMagnitudeFwd& p, const Machine& machine) {
  with_type(p.dtype, [&]<class T>() {
    with_type(p.rest_dtype, [&]<class Rest>() {
      MagnitudeFwd<T, Rest> kernel{p};
      for_each_tile(machine.parallel, &kernel, &MagnitudeFwd<T, Rest>::rows, ceil_div(p.M, kTokens),
                    4);
    });
  });
}

}  // namespace fastlora::FASTLORA_ISA
