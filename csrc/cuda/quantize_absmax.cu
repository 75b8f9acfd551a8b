// codes = the 8-bit code nearest to (absmax - offset) / nested_absmax, nested_absmax = the largest
// magnitude of 256 differences: reference.nested after its mean, bit by bit.
//
// A thread block has the 256 values that share a scale, a thread one of them.
#include "cuda/launch.cuh"
#include "cuda/nearest.cuh"
#include "cuda/parts.cuh"
#include "cuda/weights.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32;
static_assert(kThreads == kNestedBlock);
constexpr int kBounds = kNestedCodes - 1;
constexpr float kGrid = 65535.0f;  // scaled values are rounded to multiples of 2 / kGrid first

// Shared memory: the midpoints of the code, one maximum for each warp.
constexpr uint32_t kBoundsAt = 0, kMaximaAt = kNestedCodes * sizeof(float);
constexpr uint32_t kSharedBytes = kMaximaAt + kThreads / kWarp * sizeof(uint32_t);

// The largest of the magnitudes that the threads of a block hold; NaN, whose bits are above all, if
// there is one. It has a barrier.
FASTLORA_DEVICE float largest_magnitude(float value) {
  const int thread = thread_index();
  uint32_t largest = as_bits(value) & 0x7fffffffu;
#pragma unroll
  for (int i = 1; i < kWarp; i *= 2) largest = larger(largest, shuffle_xor(largest, i));
  const uint32_t maxima = shared_memory() + kMaximaAt;
  if (thread % kWarp == 0) store_shared<uint32_t>(maxima + 4 * (thread / kWarp), largest);
  block_barrier();
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; i++) {
    largest = larger(largest, load_shared<uint32_t>(maxima + 4 * i));
  }
  return as_float(largest);
}

__global__ void __launch_bounds__(kThreads) quantize_absmax_kernel(const QuantizeAbsmax p) {
  const int thread = thread_index();
  const uint32_t bounds = shared_memory() + kBoundsAt;
  if (thread < kBounds) {
    const float midpoint = multiply(add(p.code[thread], p.code[thread + 1]), 0.5f);
    store_shared<float>(bounds + 4 * thread, midpoint);
  }
  const int64_t i = int64_t{block_index()} * kThreads + thread;
  const float value = i < p.blocks ? add(p.absmax[i], -*p.offset) : 0.0f;
  const float absmax = largest_magnitude(value);
  if (thread == 0) p.nested_absmax[block_index()] = absmax;
  if (i >= p.blocks) return;

  const float scaled = clamp(multiply(value, divide(1.0f, absmax)));
  const float point = fused_multiply_add(multiply(add(scaled, 1.0f), 0.5f), kGrid, 0.5f);
  // NaN: zero times the infinite reciprocal of a block of zeros.
  const float grid = point == point ? static_cast<float>(static_cast<int>(point)) : 0.0f;
  const float rounded = add(divide(multiply(2.0f, grid), kGrid), -1.0f);
  p.absmax_8bit[i] = static_cast<uint8_t>(bounds_below<kBounds>(bounds, rounded));
}

}  // namespace

const char* quantize_absmax(const QuantizeAbsmax& p, Stream stream) {
  if (p.blocks == 0) return nullptr;
  return launch(quantize_absmax_kernel, ceil_div(p.blocks, kThreads), kThreads, kSharedBytes,
                stream, p);
}

}  // namespace fastlora::cuda
