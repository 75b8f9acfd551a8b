// y = x W^T + bias + factor * S B^T, W in 4 bits: see qlora_gemm.cuh.
#include "cuda/qlora_gemm.cuh"

namespace fastlora::cuda {

int64_t qlora_gemm_workspace(int64_t M, int64_t outputs, int64_t inputs) {
  const int64_t splits = gemm_splits(M, outputs, inputs);
  return splits == 1 ? 0 : splits * M * outputs;
}

const char* qlora_gemm_fwd(const QloraGemm& p, float* workspace, Stream stream) {
  return run_qlora_gemm<true>(p, workspace, stream);
}

}  // namespace fastlora::cuda
