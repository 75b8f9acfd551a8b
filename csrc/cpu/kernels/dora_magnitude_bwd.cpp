// dz = factor * dy, dfactor = sum of dy * z and drest = sum of dy, in one pass over dy and z.
//
// Sums go over the tokens of a tile, and then over the tiles in their order: the result does not depend
// on the number of threads.
#include "../runtime/scratch.h"
#include "../runtime/table.h"
#include "../runtime/tiles.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kTokens = 32;   // of a tile
constexpr int64_t kStrip = 1024;  // columns of a tile

template <class T>
struct MagnitudeBwd {
  const DoraMagnitudeBwd& p;
  const int64_t strips, blocks;
  float* products;  // [blocks][N], each tile's part of dfactor
  float* sums;      // [blocks][N], each tile's part of drest

  explicit MagnitudeBwd(const DoraMagnitudeBwd& params)
      : p(params),
        strips(ceil_div(p.N, kStrip)),
        blocks(ceil_div(p.M, kTokens)),
        products(nullptr),
        sums(nullptr) {}

  void rows(int64_t tile) {
    const int64_t block = tile / strips, begin = block * kTokens, end = min(p.M, begin + kTokens);
    const int64_t first = tile % strips * kStrip, columns = min(kStrip, p.N - first);
    float* product = p.dfactor ? products + block * p.N + first : nullptr;
    float* sum = p.drest ? sums + block * p.N + first : nullptr;
    for (int64_t m = begin; m < end; m++) {
      const T* dy = static_cast<const T*>(p.dy) + m * p.lddy + first;
      if (p.dz) scale(dy, first, columns, static_cast<T*>(p.dz) + m * p.N + first);
      if (p.dfactor) {
        const T* z = static_cast<const T*>(p.z) + m * p.ldz + first;
        for (int64_t n = 0; n < columns; n += kLanes) {
          const int64_t count = columns - n;
          const Vec before = m > begin ? load(product + n, count) : zero();
          store(product + n, fma(load(dy + n, count), load(z + n, count), before), count);
        }
      }
      if (p.drest) {
        for (int64_t n = 0; n < columns; n += kLanes) {
          const int64_t count = columns - n;
          const Vec before = m > begin ? load(sum + n, count) : zero();
          store(sum + n, add(load(dy + n, count), before), count);
        }
      }
    }
  }

  void scale(const T* dy, int64_t first, int64_t columns, T* dz) const {
    for (int64_t n = 0; n < columns; n += kLanes) {
      const int64_t count = columns - n;
      store(dz + n, mul(load(dy + n, count), load(p.factor + first + n, count)), count);
    }
  }

  void total(int64_t strip) {
    const int64_t first = strip * kStrip, columns = min(kStrip, p.N - first);
    if (p.dfactor) add_up(products + first, columns, p.dfactor + first);
    if (p.drest) add_up(sums + first, columns, p.drest + first);
  }

  void add_up(const float* parts, int64_t columns, float* out) const {
    for (int64_t n = 0; n < columns; n += kLanes) {
      Vec sum = zero();
      for (int64_t block = 0; block < blocks; block++) {
        sum = add(sum, load(parts + block * p.N + n, columns - n));
      }
      store(out + n, sum, columns - n);
    }
  }

  void run(const ParallelFor& parallel) {
    on_scratch(Scratch::shared, [&](Pieces& pieces) {
      if (p.dfactor) products = pieces.take<float>(blocks * p.N);
      if (p.drest) sums = pieces.take<float>(blocks * p.N);
    });
    for_each_tile(parallel, this, &MagnitudeBwd::rows, blocks * strips, strips);
    if (p.dfactor || p.drest) for_each_tile(parallel, this, &MagnitudeBwd::total, strips);
  }
};

}  // namespace

void dora_magnitude_bwd(const DoraMagnitudeBwd& p, const Machine& machine) {
  with_type(p.dtype, [&]<class T>() { MagnitudeBwd<T>(p).run(machine.parallel); });
  trim_scratch(Scratch::shared);
}

}  // namespace fastlora::FASTLORA_ISA
