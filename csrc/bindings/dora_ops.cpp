// torch.ops.fastlora.dora_*. Formulas, shapes, dtypes: fastlora/reference/.
#include <tuple>

#include "checks.h"
#include "cpu/runtime/kernels.h"
#include "parallel.h"

namespace fastlora {
namespace {

Tensor dora_norm(FASTLORA_LAYER) {
  Tensor dense;
  const Weight stored =
      weight_of(FASTLORA_LAYER_OF, lora_B.size(0), lora_A.size(1), weight.scalar_type(), dense);
  const int64_t R = lora_A.size(0);
  check_not_empty(stored);
  check_matrix(lora_A, "lora_A", R, stored.K);
  check_matrix(lora_B, "lora_B", stored.N, R);
  STD_TORCH_CHECK(lora_A.scalar_type() == lora_B.scalar_type(), "lora_B must have lora_A's dtype");
  const Tensor A = as_contiguous(lora_A), B = as_contiguous(lora_B);
  Tensor norms = empty(A, {stored.N}, ScalarType::Float);
  DoraNorm p{};
  p.R = R;
  p.weight = stored;
  p.adapter_dtype = dtype_of(A, "lora_A");
  p.lora_A = A.data_ptr();
  p.lora_B = B.data_ptr();
  p.scaling = static_cast<float>(scaling);
  p.norms = static_cast<float*>(norms.data_ptr());
  kernels().dora_norm(p, parallel_for());
  return norms;
}

const float* factor_of(const Tensor& factor, int64_t N) {
  check_vector(factor, "factor", N);
  check_dtype(factor, "factor", ScalarType::Float);
  return static_cast<const float*>(factor.data_ptr());
}

Tensor dora_magnitude_fwd(Tensor z_any, Tensor factor_any, OptionalTensor rest_any) {
  const int64_t M = z_any.size(0), N = z_any.size(1);
  check_matrix(z_any, "z", M, N);
  const Tensor z = with_contiguous_rows(z_any), factor = as_contiguous(factor_any);
  Tensor y = empty(z, {M, N});
  DoraMagnitudeFwd p{};
  p.M = M;
  p.N = N;
  p.dtype = dtype_of(z, "z");
  p.z = z.data_ptr();
  p.ldz = row_stride(z);
  p.factor = factor_of(factor, N);
  OptionalTensor rest;
  if (rest_any.has_value() && rest_any->dim() == 1) {
    rest = as_contiguous(*rest_any);
    check_vector(*rest, "rest", N);
  } else if (rest_any.has_value()) {
    check_matrix(*rest_any, "rest", M, N);
    rest = with_contiguous_rows(*rest_any);
    p.ldrest = row_stride(*rest);
  }
  if (rest.has_value()) {
    p.rest_dtype = dtype_of(*rest, "rest");
    p.rest = rest->data_ptr();
  }
  p.y = y.data_ptr();
  kernels().dora_magnitude_fwd(p, parallel_for());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> dora_magnitude_bwd(Tensor dy_any, Tensor z_any,
                                                      Tensor factor_any, bool need_dz,
                                                      bool need_dfactor, bool need_drest) {
  const int64_t M = z_any.size(0), N = z_any.size(1);
  check_matrix(z_any, "z", M, N);
  check_matrix(dy_any, "dy", M, N);
  STD_TORCH_CHECK(dy_any.scalar_type() == z_any.scalar_type(), "dy must have z's dtype");
  const Tensor dy = with_contiguous_rows(dy_any), z = with_contiguous_rows(z_any);
  const Tensor factor = as_contiguous(factor_any);
  Tensor dz = wanted(z, need_dz, {M, N}, std::nullopt);
  Tensor dfactor = wanted(z, need_dfactor, {N}, ScalarType::Float);
  Tensor drest = wanted(z, need_drest, {N}, ScalarType::Float);
  DoraMagnitudeBwd p{};
  p.M = M;
  p.N = N;
  p.dtype = dtype_of(z, "z");
  p.dy = dy.data_ptr();
  p.lddy = row_stride(dy);
  p.z = z.data_ptr();
  p.ldz = row_stride(z);
  p.factor = factor_of(factor, N);
  p.dz = need_dz ? dz.data_ptr() : nullptr;
  p.dfactor = need_dfactor ? static_cast<float*>(dfactor.data_ptr()) : nullptr;
  p.drest = need_drest ? static_cast<float*>(drest.data_ptr()) : nullptr;
  kernels().dora_magnitude_bwd(p, parallel_for());
  return {dz, dfactor, drest};
}

// The kernels read the seed of any dropout that they are called for.
Dropout some_dropout_of(double dropout_p, const Tensor& seed) {
  STD_TORCH_CHECK(dropout_p > 0.0, "dropout_p must be above 0, got ", dropout_p);
  return dropout_of(dropout_p, seed);
}

std::tuple<Tensor, Tensor> dora_dropout_fwd(Tensor x_any, double dropout_p, Tensor seed) {
  const int64_t M = x_any.size(0), K = x_any.size(1);
  check_matrix(x_any, "x", M, K);
  const Tensor x = with_contiguous_rows(x_any);
  Tensor kept = empty(x, {M, K}), rest = empty(x, {M, K});
  DoraDropoutFwd p{};
  p.M = M;
  p.K = K;
  p.dtype = dtype_of(x, "x");
  p.x = x.data_ptr();
  p.ldx = row_stride(x);
  p.dropout = some_dropout_of(dropout_p, seed);
  p.kept = kept.data_ptr();
  p.rest = rest.data_ptr();
  kernels().dora_dropout_fwd(p, parallel_for());
  return {kept, rest};
}

Tensor dora_dropout_bwd(Tensor dkept_any, Tensor drest_any, double dropout_p, Tensor seed) {
  const int64_t M = dkept_any.size(0), K = dkept_any.size(1);
  check_matrix(dkept_any, "dkept", M, K);
  check_matrix(drest_any, "drest", M, K);
  STD_TORCH_CHECK(dkept_any.scalar_type() == drest_any.scalar_type(),
                  "drest must have dkept's dtype");
  const Tensor dkept = with_contiguous_rows(dkept_any), drest = with_contiguous_rows(drest_any);
  Tensor dx = empty(dkept, {M, K});
  DoraDropoutBwd p{};
  p.M = M;
  p.K = K;
  p.dtype = dtype_of(dkept, "dkept");
  p.dkept = dkept.data_ptr();
  p.lddkept = row_stride(dkept);
  p.drest = drest.data_ptr();
  p.lddrest = row_stride(drest);
  p.dropout = some_dropout_of(dropout_p, seed);
  p.dx = dx.data_ptr();
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
