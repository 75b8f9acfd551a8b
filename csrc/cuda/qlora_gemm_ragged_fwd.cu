// qlora_gemm_fwd for a K that is no multiple of 32: see code_runs.cuh.
#include "cuda/qlora_gemm.cuh"

namespace fastlora::cuda {

int64_t qlora_gemm_ragged_fwd_workspace(int64_t M, int64_t N, int64_t K) {
  return gemm_workspace<RaggedCodes, true>(M, N, K);
}

const char* qlora_gemm_ragged_fwd(const QloraGemm& p, float* workspace, Stream stream) {
  return run_gemm<RaggedCodes, true>(p, workspace, stream);
}

}  // namespace fastlora::cuda
