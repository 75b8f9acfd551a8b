// torch.ops.fastlora.lora_embedding_*. Formulas, shapes, dtypes: fastlora/reference/.
#include <tuple>

#include "checks.h"
#include "cpu/runtime/kernels.h"
#include "parallel.h"

namespace fastlora {
namespace {

void check_ids(const Tensor& ids, int64_t V) {
  FASTLORA_CHECK(ids.dim() == 1, "ids must be a vector, got ", ids.dim(), " dimensions");
  check_dtype(ids, "ids", ScalarType::Long);
  const int64_t* id = data_of<const int64_t>(ids);
  for (int64_t m = 0; m < ids.numel(); m++) {
    FASTLORA_CHECK(0 <= id[m] && id[m] < V, "ids must be from 0 to ", V - 1, ", got ", id[m]);
  }
}

Adapter adapter_of(const Tensor& A, const Tensor& B, int64_t N, int64_t V) {
  FASTLORA_CHECK(A.size(0) > 0, "lora_A must have a rank of at least 1");
  return Adapter(A, B, std::nullopt, N, V);
}

Tensor lora_embedding_fwd(Tensor ids_any, Tensor weight_any, Tensor A_any, Tensor B_any,
                          double scaling, double weight_scale) {
  const Tensor ids = as_contiguous(ids_any);
  const auto [V, N] = sizes_of(weight_any, "weight");
  const int64_t M = ids.numel(), R = sizes_of(A_any, "lora_A").rows;
  check_ids(ids, V);
  const Adapter adapter = adapter_of(A_any, B_any, N, V);
  const Tensor weight = as_contiguous(weight_any);
  Tensor y = empty(weight, {M, N});
  LoraEmbeddingFwd p{};
  p.M = M;
  p.N = N;
  p.R = R;
  p.V = V;
  p.dtype = dtype_of(weight, "weight");
  adapter.fill(p, scaling);
  p.ids = data_of<const int64_t>(ids);
  p.weight = memory_of(weight);
  p.weight_scale = static_cast<float>(weight_scale);
  p.y = memory_of(y);
  kernels().lora_embedding_fwd(p, parallel_for());
  return y;
}

std::tuple<Tensor, Tensor> lora_embedding_bwd(Tensor dy_any, Tensor ids_any, Tensor A_any,
                                              Tensor B_any, double scaling, int64_t padding_idx,
                                              bool need_dA, bool need_dB) {
  const Tensor ids = as_contiguous(ids_any);
  const auto [R, V] = sizes_of(A_any, "lora_A");
  const int64_t M = ids.numel(), N = sizes_of(B_any, "lora_B").rows;
  check_ids(ids, V);
  const Adapter adapter = adapter_of(A_any, B_any, N, V);
  check_matrix(dy_any, "dy", M, N);
  const Tensor dy = with_contiguous_rows(dy_any, "dy");
  Tensor dA = wanted(dy, need_dA, {R, V}, ScalarType::Float);
  Tensor dB = wanted(dy, need_dB, {N, R}, ScalarType::Float);
  LoraEmbeddingBwd p{};
  p.M = M;
  p.N = N;
  p.R = R;
  p.V = V;
  p.dtype = dtype_of(dy, "dy");
  adapter.fill(p, scaling);
  p.dy = memory_of(dy);
  p.lddy = row_stride(dy);
  p.ids = data_of<const int64_t>(ids);
  p.padding_idx = padding_idx;
  p.dA = need_dA ? data_of<float>(dA) : nullptr;
  p.dB = need_dB ? data_of<float>(dB) : nullptr;
  kernels().lora_embedding_bwd(p, parallel_for());
  if (need_dA) dA = torch::stable::to(dA, adapter.A.scalar_type());
  if (need_dB) dB = torch::stable::to(dB, adapter.B.scalar_type());
  return {dA, dB};
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_embedding_fwd", TORCH_BOX(&fastlora::lora_embedding_fwd));
  m.impl("lora_embedding_bwd", TORCH_BOX(&fastlora::lora_embedding_bwd));
}
