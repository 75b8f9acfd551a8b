// torch.ops.fastlora.dora_*. Formulas, shapes, dtypes: fastlora/reference/.
#include <tuple>

#include "checks.h"
#include "cpu/runtime/kernels.h"
#include "parallel.h"

namespace fastlora {
namespace {

Tensor dora_norm(FASTLORA_LAYER) {
  Tensor dense;
  const auto [R, K] = sizes_of(lora_A, "lora_A");
  const int64_t N = sizes_of(lora_B, "lora_B").rows;
  const Weight stored = weight_of(FASTLORA_LAYER_OF, N, K, weight.scalar_type(), dense);
  check_not_empty(stored);
  const Adapter adapter(lora_A, lora_B, std::nullopt, N, K);
  Tensor norms = empty(adapter.A, {stored.N}, ScalarType::Float);
  DoraNorm p{};
  p.R = R;
  p.weight = stored;
  adapter.fill(p, scaling);
  p.norms = data_of<float>(norms);
  kernels().dora_norm(p, parallel_for());
  return norms;
}

Tensor dora_magnitude_fwd(Tensor z_any, Tensor factor_any, OptionalTensor rest_any) {
  const auto [M, N] = sizes_of(z_any, "z");
  const Tensor z = with_contiguous_rows(z_any, "z"), factor = as_contiguous(factor_any);
  Tensor y = empty(z, {M, N});
  DoraMagnitudeFwd p{};
  p.M = M;
  p.N = N;
  p.dtype = dtype_of(z, "z");
  p.z = memory_of(z);
  p.ldz = row_stride(z);
  p.factor = vector_of<float>(factor, "factor", N);
  OptionalTensor rest;
  if (rest_any.has_value() && rest_any->dim() == 1) {
    rest = as_contiguous(*rest_any);
    check_vector(*rest, "rest", N);
  } else if (rest_any.has_value()) {
    check_matrix(*rest_any, "rest", M, N);
    rest = with_contiguous_rows(*rest_any, "rest");
    p.ldrest = row_stride(*rest);
  }
  if (rest.has_value()) {
    p.rest_dtype = dtype_of(*rest, "rest");
    p.rest = memory_of(*rest);
  }
  p.y = memory_of(y);
  kernels().dora_magnitude_fwd(p, parallel_for());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> dora_magnitude_bwd(Tensor dy_any, Tensor z_any,
                                                      Tensor factor_any, bool need_dz,
                                                      bool need_dfactor, bool need_drest) {
  const auto [M, N] = sizes_of(z_any, "z");
  check_matrix(dy_any, "dy", M, N);
  FASTLORA_CHECK(dy_any.scalar_type() == z_any.scalar_type(), "dy must have z's dtype");
  const Tensor dy = with_contiguous_rows(dy_any, "dy"), z = with_contiguous_rows(z_any, "z");
  const Tensor factor = as_contiguous(factor_any);
  Tensor dz = wanted(z, need_dz, {M, N}, std::nullopt);
  Tensor dfactor = wanted(z, need_dfactor, {N}, ScalarType::Float);
  Tensor drest = wanted(z, need_drest, {N}, ScalarType::Float);
  DoraMagnitudeBwd p{};
  p.M = M;
  p.N = N;
  p.dtype = dtype_of(z, "z");
  p.dy = memory_of(dy);
  p.lddy = row_stride(dy);
  p.z = memory_of(z);
  p.ldz = row_stride(z);
  p.factor = vector_of<float>(factor, "factor", N);
  p.dz = need_dz ? memory_of(dz) : nullptr;
  p.dfactor = need_dfactor ? data_of<float>(dfactor) : nullptr;
  p.drest = need_drest ? data_of<float>(drest) : nullptr;
  kernels().dora_magnitude_bwd(p, parallel_for());
  return {dz, dfactor, drest};
}

// The kernels read the seed of any dropout that they are called for.
Dropout some_dropout_of(double dropout_p, const Tensor& seed) {
  FASTLORA_CHECK(dropout_p > 0.0, "dropout_p must be above 0, got ", dropout_p);
  return dropout_of(dropout_p, seed);
}

std::tuple<Tensor, Tensor> dora_dropout_fwd(Tensor x_any, double dropout_p, Tensor seed) {
  const auto [M, K] = sizes_of(x_any, "x");
  const Tensor x = with_contiguous_rows(x_any, "x");
  Tensor kept = empty(x, {M, K}), rest = empty(x, {M, K});
  DoraDropoutFwd p{};
  p.M = M;
  p.K = K;
  p.dtype = dtype_of(x, "x");
  p.x = memory_of(x);
  p.ldx = row_stride(x);
  p.dropout = some_dropout_of(dropout_p, seed);
  p.kept = memory_of(kept);
  p.rest = memory_of(rest);
  kernels().dora_dropout_fwd(p, parallel_for());
  return {kept, rest};
}

Tensor dora_dropout_bwd(Tensor dkept_any, Tensor drest_any, double dropout_p, Tensor seed) {
  const auto [M, K] = sizes_of(dkept_any, "dkept");
  check_matrix(drest_any, "drest", M, K);
  FASTLORA_CHECK(dkept_any.scalar_type() == drest_any.scalar_type(),
                 "drest must have dkept's dtype");
  const Tensor dkept = with_contiguous_rows(dkept_any, "dkept"),
               drest = with_contiguous_rows(drest_any, "drest");
  Tensor dx = empty(dkept, {M, K});
  DoraDropoutBwd p{};
  p.M = M;
  p.K = K;
  p.dtype = dtype_of(dkept, "dkept");
  p.dkept = memory_of(dkept);
  p.lddkept = row_stride(dkept);
  p.drest = memory_of(drest);
  p.lddrest = row_stride(drest);
  p.dropout = some_dropout_of(dropout_p, seed);
  p.dx = memory_of(dx);
  kernels().dora_dropout_bwd(p, parallel_for());
  return dx;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("dora_norm", TORCH_BOX(&fastlora::dora_norm));
  m.impl("dora_magnitude_fwd", TORCH_BOX(&fastlora::dora_magnitude_fwd));
  m.impl("dora_magnitude_bwd", TORCH_BOX(&fastlora::dora_magnitude_bwd));
  m.impl("dora_dropout_fwd", TORCH_BOX(&fastlora::dora_dropout_fwd));
  m.impl("dora_dropout_bwd", TORCH_BOX(&fastlora::dora_dropout_bwd));
}
