// Adds the parts of a product and its LoRA term; a thread has one output of eight tokens.
#include "cuda/finish.cuh"

#include "cuda/launch.cuh"
#include "cuda/parts.cuh"
#include "cuda/weights.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256, kTokens = 8;
constexpr int kRanks = 128;  // of S in shared memory at once
constexpr uint32_t kSharedBytes = kTokens * kRanks * sizeof(float);

__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishParams p) {
  // A grid has less than 2^31 blocks: their number needs no 64-bit division, which spills.
  const auto token_tiles = static_cast<uint32_t>(ceil_div(p.M, kTokens));
  const auto block = static_cast<uint32_t>(block_index());
  const int64_t token0 = int64_t{block % token_tiles} * kTokens;
  const int64_t output = int64_t{block / token_tiles} * kThreads + thread_index();
  const bool inside = output < p.outputs, writes_S = block < token_tiles;
  float lora[kTokens] = {};
#pragma unroll 1
  for (int64_t rank0 = 0; rank0 < p.R; rank0 += kRanks) {
    block_barrier();
    for (int i = thread_index(); i < kTokens * kRanks; i += kThreads) {
      const int64_t token = token0 + i / kRanks, rank = rank0 + i % kRanks;
      float sum = 0.0f;
      if (token < p.M && rank < p.R) {
        const int64_t at = token * p.R + rank;
#pragma unroll 1
        for (int64_t s = 0; s < p.S_splits; s++) sum += p.S_partial[s * p.M * p.R + at];
        if (writes_S) p.S[at] = sum;
      }
      store_shared<float>(shared_memory() + 4 * static_cast<uint32_t>(i), sum);
    }
    block_barrier();
    const int ranks = static_cast<int>(smaller<int64_t>(p.R - rank0, kRanks));
#pragma unroll 1
    for (int r = 0; inside && r < ranks; r++) {
      const float b = load(p.adapter, p.adapter_dtype, output * p.R + rank0 + r);
#pragma unroll
      for (int m = 0; m < kTokens; m++) {
        const uint32_t at = static_cast<uint32_t>(m * kRanks + r) * 4;
        lora[m] += load_shared<float>(shared_memory() + at) * b;
      }
    }
  }
  if (!inside) return;
  const float bias = p.bias == nullptr ? 0.0f : load(p.bias, p.bias_dtype, output);
#pragma unroll
  for (int m = 0; m < kTokens; m++) {
    if (token0 + m >= p.M) break;
    const int64_t at = (token0 + m) * p.outputs + output;
    float sum = p.factor * lora[m] + bias;
#pragma unroll 1
    for (int64_t s = 0; s < p.splits; s++) sum += p.partial[s * p.M * p.outputs + at];
    store(p.y, p.y_dtype, at, sum);
  }
}

}  // namespace

const char* set_device(int device) { return use(device); }
const char* device_fault(int device) { return fault_on(device, finish_kernel); }

const char* finish(const FinishParams& p, Stream stream) {
  const int64_t blocks = ceil_div(p.M, kTokens) * ceil_div(p.outputs, kThreads);
  return launch(finish_kernel, blocks, kThreads, kSharedBytes, stream, p);
}

}  // namespace fastlora::cuda
