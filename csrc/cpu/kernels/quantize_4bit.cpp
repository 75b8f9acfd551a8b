// absmax of each block, then for each element the code nearest to w / absmax.
//
// The arithmetic is bitsandbytes': a full block is multiplied by 1 / max(absmax, 1e-38), the last, short
// one is divided by its absmax, which is stored with the same floor; a value on the midpoint of two
// codes takes the lower one, NaN the highest.
#include "../runtime/table.h"
#include "../weight/weights.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kNeighbours = 256;  // blocks in a run for one thread

constexpr float kSmallest = 1e-38f;

FASTLORA_INLINE uint8_t nearest(float x, const Quantize4bit& p) {
  int position = 0;
  for (int i = 0; i < 15; i++) position += !(x <= p.bounds[i]);
  return p.order[position];
}

FASTLORA_INLINE float clamp(float x) {
  if (x < -1.0f) return -1.0f;
  return x > 1.0f ? 1.0f : x;
}

template <class T>
void quantize_block(const Quantize4bit& p, int64_t block) {
  const T* w = static_cast<const T*>(p.weight) + block * p.blocksize;
  const int64_t count = min(p.blocksize, p.elements - block * p.blocksize);
  float absmax = 0;
  bool nan = false;
  for (int64_t i = 0; i < count; i++) {
    const float value = __builtin_fabsf(to_float(w[i]));
    nan |= value != value;
    absmax = value > absmax ? value : absmax;
  }
  if (nan) absmax = __builtin_nanf("");
  const bool full = count == p.blocksize;
  const float floored = absmax < kSmallest ? kSmallest : absmax;
  p.absmax[block] = full ? absmax : floored;
  const float factor = 1.0f / floored;
  uint8_t* out = p.packed + block * p.blocksize / 2;
  for (int64_t i = 0; i < count; i += 2) {
    const auto code_at = [&](int64_t j) {
      if (j == count) return nearest(0.0f, p);  // the second half of an odd last byte
      const float value = to_float(w[j]);
      return nearest(clamp(full ? value * factor : value / floored), p);
    };
    out[i / 2] = static_cast<uint8_t>(code_at(i) << 4 | code_at(i + 1));
  }
}

}  // namespace

void quantize_4bit(const Quantize4bit& p, const Machine& machine) {
  machine.parallel.each_run(ceil_div(p.elements, p.blocksize), kNeighbours,
                            [&](int64_t begin, int64_t end) {
                              with_type(p.dtype, [&]<class T>() {
                                for (int64_t block = begin; block < end; block++)
                                  quantize_block<T>(p, block);
                              });
                            });
}

}  // namespace fastlora::FASTLORA_ISA
