// y = x W^T + bias + factor * S B^T, W in 4 bits: see qlora_gemm.cuh.
#include "cuda/qlora_gemm.cuh"

namespace fastlora::cuda {

int64_t qlora_gemm_fwd_workspace(int64_t M, int64_t N, int64_t K) {
  return K % kRun == 0 ? gemm_workspace<AlignedCodes, true>(M, N, K)
                       : qlora_gemm_ragged_fwd_workspace(M, N, K);
}

const char* qlora_gemm_fwd(const QloraGemm& p, float* workspace, Stream stream) {
  return p.weight.K % kRun == 0 ? run_gemm<AlignedCodes, true>(p, workspace, stream)
                                : qlora_gemm_ragged_fwd(p, workspace, stream);
}

}  // namespace fastlora::cuda
