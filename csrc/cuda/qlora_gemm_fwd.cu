// y = x W^T + bias + factor * S B^T, W in 4 bits: see qlora_gemm.cuh.
#include "cuda/qlora_gemm.cuh"

namespace fastlora::cuda {

int64_t qlora_gemm_fwd_workspace(int64_t M, int64_t N, int64_t K) {
  return gemm_workspace<true>(M, N, K);
}

const char* qlora_gemm_fwd(const QloraGemm& p, float* workspace, Stream stream) {
  return run_qlora_gemm<true>(p, workspace, stream);
}

}  // namespace fastlora::cuda
