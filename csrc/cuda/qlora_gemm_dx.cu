// dx = dy W + drop'(dS A), W in 4 bits: see qlora_gemm.cuh.
#include "cuda/qlora_gemm.cuh"

namespace fastlora::cuda {

static_assert(kOutputs == kDropoutBlock, "a tile's columns are one block of random bits");

int64_t qlora_gemm_dx_workspace(int64_t M, int64_t N, int64_t K) {
  return gemm_workspace<false>(M, K, N);
}

const char* qlora_gemm_dx(const QloraGemm& p, float* workspace, Stream stream) {
  return run_qlora_gemm<false>(p, workspace, stream);
}

}  // namespace fastlora::cuda
