// dx = dy W + drop'(dS A), W in 4 bits: see qlora_gemm.cuh.
#include "cuda/qlora_gemm.cuh"

namespace fastlora::cuda {

int64_t qlora_gemm_dx_workspace(int64_t M, int64_t N, int64_t K) {
  return K % kRun == 0 ? gemm_workspace<AlignedCodes, false>(M, K, N)
                       : qlora_gemm_ragged_dx_workspace(M, N, K);
}

const char* qlora_gemm_dx(const QloraGemm& p, float* workspace, Stream stream) {
  return p.weight.K % kRun == 0 ? run_gemm<AlignedCodes, false>(p, workspace, stream)
                                : qlora_gemm_ragged_dx(p, workspace, stream);
}

}  // namespace fastlora::cuda
