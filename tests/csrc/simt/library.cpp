// torch.ops.fastlora_emulated: csrc/bindings/cuda_ops.cpp with emulated kernels, for CPU tensors.
// Here: C functions for the tests.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "simt.h"

#pragma GCC visibility push(default)
extern "C" {

void simt_seed(uint64_t value) { simt::seed(value); }
void simt_set_architecture(int sm) { simt::set_architecture(sm); }
simt::Counters simt_counters() { return simt::counters(); }

// One warp executes one instruction; what each lane holds lies at [lane].
void simt_multiply_add(bool half, float (*d)[4], const uint32_t (*a)[4], const uint32_t (*b)[2]) {
  using namespace fastlora::cuda;
  simt::launch(1, simt::kWarp, 0, [&] {
    const int lane = thread_index();
    const uint32_t registers[4] = {a[lane][0], a[lane][1], a[lane][2], a[lane][3]};
    float sums[4] = {d[lane][0], d[lane][1], d[lane][2], d[lane][3]};
    if (half) {
      multiply_add<f16>(sums, registers, b[lane][0], b[lane][1]);
    } else {
      multiply_add<bf16>(sums, registers, b[lane][0], b[lane][1]);
    }
    for (int i = 0; i < 4; i++) d[lane][i] = sums[i];
  });
}

// Row r of matrix i lies at 128 r + 16 i of `memory` [8][128 bytes].
void simt_load_matrices(bool transposed, uint32_t (*r)[4], const uint32_t* memory) {
  using namespace fastlora::cuda;
  simt::launch(1, simt::kWarp, 1024, [&] {
    const int lane = thread_index();
    for (uint32_t i = 0; i < 8; i++) {
      const uint32_t word = static_cast<uint32_t>(lane) * 8 + i;
      store_shared<uint32_t>(shared_memory() + 4 * word, memory[word]);
    }
    block_barrier();
    const uint32_t row = static_cast<uint32_t>(lane) % 8, matrix = static_cast<uint32_t>(lane) / 8;
    uint32_t registers[4];
    if (transposed) {
      load_matrices_transposed(registers, shared_memory() + 128 * row + 16 * matrix);
    } else {
      load_matrices(registers, shared_memory() + 128 * row + 16 * matrix);
    }
    for (int i = 0; i < 4; i++) r[lane][i] = registers[i];
  });
}

uint32_t simt_permute(uint32_t a, uint32_t b, uint32_t selector) {
  return fastlora::cuda::permute(a, b, selector);
}
uint32_t simt_pack(bool half, float low, float high) {
  using namespace fastlora::cuda;
  return half ? pack<f16>(low, high) : pack<bf16>(low, high);
}
float simt_to_float(bool half, uint16_t bits) {
  using namespace fastlora::cuda;
  return half ? to_float(f16{bits}) : to_float(bf16{bits});
}

}  // extern "C"
#pragma GCC visibility pop
