// absmax of each block, then for each element the code nearest to w / absmax, two codes a byte.
//
// The arithmetic is that of reference.quantize_4bit. A thread holds 16 neighbouring elements; the
// threads of a block of elements find its absmax together.
#include "cuda/launch.cuh"
#include "cuda/nearest.cuh"
#include "cuda/parts.cuh"
#include "cuda/weights.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kElements = 16;                 // of a thread
constexpr int kChunk = kThreads * kElements;  // of a thread block: the largest block of elements
constexpr float kSmallest = 1e-38f;           // reference._ABSMAX_MIN
constexpr int kBounds = 15;

// Shared memory: the bounds, the order of the codes, one maximum for each warp.
constexpr uint32_t kBoundsAt = 0, kOrderAt = 64, kMaximaAt = 128, kSharedBytes = 160;

FASTLORA_DEVICE uint32_t nearest(float x) {
  const uint32_t position = bounds_below<kBounds>(shared_memory() + kBoundsAt, x);
  return load_shared<uint32_t>(shared_memory() + kOrderAt + 4 * position);
}

// Two elements out of a 32-bit word, the first below; one out of a word that holds an fp32 number.
template <class T>
FASTLORA_DEVICE float element(uint32_t word, int i) {
  return to_float(T{static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16)});
}
template <>
FASTLORA_DEVICE float element<float>(uint32_t word, int) {
  return as_float(word);
}

// Elements [first, first + kElements); those past the end are zero.
template <class T>
FASTLORA_DEVICE void load_elements(const Quantize4bit& p, int64_t first, float (&w)[kElements]) {
  const T* source = static_cast<const T*>(p.weight) + first;
  if (first + kElements <= p.elements &&
      reinterpret_cast<uintptr_t>(source) % sizeof(Words4) == 0) {
    constexpr int kInWord = sizeof(uint32_t) / sizeof(T), kInVector = 4 * kInWord;
#pragma unroll
    for (int i = 0; i < kElements; i += kInVector) {
      const Words4 vector = *reinterpret_cast<const Words4*>(source + i);
#pragma unroll
      for (int j = 0; j < kInVector; j++) w[i + j] = element<T>(vector.w[j / kInWord], j);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; i++) w[i] = first + i < p.elements ? to_float(source[i]) : 0.0f;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) quantize(const Quantize4bit p) {
  const int thread = thread_index();
  if (thread < kBounds) {
    store_shared<float>(shared_memory() + kBoundsAt + 4 * thread, p.bounds[thread]);
  }
  if (thread < kCodes) {
    store_shared<uint32_t>(shared_memory() + kOrderAt + 4 * thread, p.order[thread]);
  }

  const int64_t first = int64_t{block_index()} * kChunk + thread * kElements;
  float w[kElements];
  load_elements<T>(p, first, w);
  // Magnitudes order like their bits, and NaN above all: so the largest of the bits is NaN's, if
  // there is one.
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kElements; i++) {
    largest = larger(largest, as_bits(w[i]) & 0x7fffffffu);
  }
  const int threads = static_cast<int>(p.blocksize / kElements);  // that share a block
  for (int i = 1; i < threads && i < kWarp; i *= 2) {
    largest = larger(largest, shuffle_xor(largest, i));
  }
  if (thread % kWarp == 0) {
    store_shared<uint32_t>(shared_memory() + kMaximaAt + 4 * (thread / kWarp), largest);
  }
  block_barrier();
  if (threads > kWarp) {
    const int warps = threads / kWarp, start = thread / threads * warps;
    for (int i = 0; i < warps; i++) {
      largest =
          larger(largest, load_shared<uint32_t>(shared_memory() + kMaximaAt + 4 * (start + i)));
    }
  }
  if (first >= p.elements) return;

  // A full block is multiplied by the reciprocal of absmax, a short last one divided by absmax.
  const int64_t block = first / p.blocksize;
  const bool full = (block + 1) * p.blocksize <= p.elements;
  const float absmax = as_float(largest);
  const float floored = absmax < kSmallest ? kSmallest : absmax;
  if (first % p.blocksize == 0) p.absmax[block] = full ? absmax : floored;
  const float factor = divide(1.0f, floored);
  uint32_t packed[kElements / 8] = {};
#pragma unroll
  for (int i = 0; i < kElements; i++) {
    const float scaled = full ? multiply(w[i], factor) : divide(w[i], floored);
    // The missing half of an odd last byte is a zero, whatever absmax.
    const uint32_t code = nearest(first + i < p.elements ? clamp(scaled) : 0.0f);
    packed[i / 8] |= code << (8 * (i % 8 / 2) + (i % 2 == 0 ? 4 : 0));
  }
  if (first + kElements <= p.elements) {
    *reinterpret_cast<Words2*>(p.packed + first / 2) = {{packed[0], packed[1]}};
  } else {
#pragma unroll
    for (int i = 0; i < kElements / 2; i++) {
      if (first + 2 * i < p.elements) {
        p.packed[first / 2 + i] = static_cast<uint8_t>(packed[i / 4] >> (8 * (i % 4)));
      }
    }
  }
}

template <class T>
const char* run(const Quantize4bit& p, Stream stream) {
  return launch(quantize<T>, ceil_div(p.elements, kChunk), kThreads, kSharedBytes, stream, p);
}

}  // namespace

const char* quantize_4bit(const Quantize4bit& p, Stream stream) {
  if (p.elements == 0) return nullptr;
  switch (p.dtype) {
    case DType::f32:
      return run<float>(p, stream);
    case DType::bf16:
      return run<bf16>(p, stream);
    default:
      return run<f16>(p, stream);
  }
}

}  // namespace fastlora::cuda
