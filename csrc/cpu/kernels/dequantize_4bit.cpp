// out = code[q] * absmax, in fp32, rounded once to the output's dtype.
#include "../runtime/table.h"
#include "../weight/weights.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kStep = 16384;    // elements of a tile
constexpr int64_t kNeighbours = 8;  // tiles in a run for one thread

template <class T>
void dequantize(const Dequantize4bit& p, int64_t begin, int64_t end) {
  const Quant4bit& q = p.quant;
  const Statistics statistics = statistics_of(q);
  const int shift = log2_of(q.blocksize);
  T* out = static_cast<T*>(p.out);
  while (begin < end) {
    const int64_t stop = min(end, begin + kStep);
    // A step is at most 512 blocks of the smallest size.
    float absmax[kStep / kGroup + 1];
    const int64_t first = begin >> shift, last = ((stop - 1) >> shift) + 1;
    if (q.absmax == nullptr) {
      decode_absmax(statistics, first, last, absmax);
    } else {
      for (int64_t b = first; b < last; b++) absmax[b - first] = q.absmax[b];
    }
    // The table is not rounded: the store rounds, and to the same value.
    const FourBit w{q.packed, q.code, absmax - first, 0, shift, DType::f32, nullptr};
#if defined(__AVX512VBMI__)
    if constexpr (sizeof(T) == 2) {
      const auto table = [&](float scale) __attribute__((always_inline)) {
        T values[kLanes];
        store(values, mul(load(q.code), broadcast(scale)));
        return word_table(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
      };
      constexpr int64_t kAhead = 2048;  // bytes
      begin +=
          decode_groups(w, begin, stop - begin, kAhead, table,
                        [&, at = out + begin](int64_t i, __m512i v)
                            __attribute__((always_inline)) { _mm512_storeu_si512(at + i, v); });
    }
#endif
    decode(w, begin, stop - begin, [&](int64_t i, Vec v) __attribute__((always_inline)) {
      if (begin + i + kLanes <= stop) {
        store(out + begin + i, v);
      } else if (begin + i < stop) {
        store(out + begin + i, v, stop - begin - i);
      }
    });
    begin = stop;
  }
}

}  // namespace

void dequantize_4bit(const Dequantize4bit& p, const Machine& machine) {
  machine.parallel.each_run(ceil_div(p.elements, kStep), kNeighbours,
                            [&](int64_t begin, int64_t end) {
                              with_type(p.dtype, [&]<class T>() {
                                dequantize<T>(p, begin * kStep, min(end * kStep, p.elements));
                              });
                            });
}

}  // namespace fastlora::FASTLORA_ISA
