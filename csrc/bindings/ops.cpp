// torch.ops.fastlora.*: schemas and CPU implementations, on torch's stable ABI.
//
// Formulas, shapes and dtypes: fastlora/reference.py. The ops allocate what they return; a gradient
// that is not asked for comes back as an empty tensor.
#include <tuple>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/tile_sizes.h"
#include "parallel.h"
#include "schemas.h"

namespace fastlora {
namespace {

Tensor dense_weight(const Tensor& weight, const Tensor& x) {
  check_matrix(weight, "weight", weight.size(0), x.size(1));
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  return torch::stable::contiguous(weight);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_any, const Weight& weight,
                                   const OptionalTensor& bias_any, const Tensor& A_any,
                                   const Tensor& B_any, double scaling, double dropout_p,
                                   const OptionalTensor& seed) {
  const int64_t M = x_any.size(0), R = A_any.size(0);
  check_not_empty(weight);
  check_matrix(x_any, "x", M, weight.K);
  check_matrix(A_any, "lora_A", R, weight.K);
  check_matrix(B_any, "lora_B", weight.N, R);
  STD_TORCH_CHECK(A_any.scalar_type() == B_any.scalar_type(), "lora_B must have lora_A's dtype");
  const Tensor x = with_contiguous_rows(x_any);
  const Tensor A = torch::stable::contiguous(A_any), B = torch::stable::contiguous(B_any);
  Tensor y = empty(x, {M, weight.N});
  Tensor S = empty(x, {M, R}, ScalarType::Float);

  LoraLinearFwd p{};
  p.tiles = tile_sizes();
  p.M = M;
  p.R = R;
  p.weight = weight;
  p.x_dtype = dtype_of(x, "x");
  p.adapter_dtype = dtype_of(A, "lora_A");
  p.x = x.data_ptr();
  p.ldx = row_stride(x);
  OptionalTensor bias;
  if (bias_any.has_value()) {
    bias = torch::stable::contiguous(*bias_any);
    check_vector(*bias, "bias", weight.N);
    p.bias_dtype = dtype_of(*bias, "bias");
    p.bias = bias->data_ptr();
  }
  p.lora_A = A.data_ptr();
  p.lora_B = B.data_ptr();
  p.scaling = static_cast<float>(scaling);
  p.dropout = dropout_of(dropout_p, seed);
  p.y = y.data_ptr();
  p.S = static_cast<float*>(S.data_ptr());
  kernels().lora_linear_fwd(p, parallel_for());
  return {y, S};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy_any, const Tensor& x_any,
                                                    const Weight& weight, const Tensor& A_any,
                                                    const Tensor& B_any, const Tensor& S_any,
                                                    double scaling, double dropout_p,
                                                    const OptionalTensor& seed, bool need_dx,
                                                    bool need_dA, bool need_dB, bool need_dbias) {
  const int64_t M = x_any.size(0), R = A_any.size(0), N = weight.N, K = weight.K;
  check_not_empty(weight);
  check_matrix(x_any, "x", M, K);
  check_matrix(dy_any, "dy", M, N);
  check_matrix(A_any, "lora_A", R, K);
  check_matrix(B_any, "lora_B", N, R);
  check_matrix(S_any, "S", M, R);
  check_dtype(S_any, "S", ScalarType::Float);
  STD_TORCH_CHECK(dy_any.scalar_type() == x_any.scalar_type(), "dy must have x's dtype");
  STD_TORCH_CHECK(A_any.scalar_type() == B_any.scalar_type(), "lora_B must have lora_A's dtype");
  const Tensor x = with_contiguous_rows(x_any), dy = with_contiguous_rows(dy_any);
  const Tensor A = torch::stable::contiguous(A_any), B = torch::stable::contiguous(B_any);
  const Tensor S = torch::stable::contiguous(S_any);
  const auto wanted = [&](bool needed, std::initializer_list<int64_t> sizes,
                          std::optional<ScalarType> dtype) {
    return needed ? empty(x, sizes, dtype) : empty(x, {0}, dtype);
  };
  Tensor dx = wanted(need_dx, {M, K}, std::nullopt);
  Tensor dA = wanted(need_dA, {R, K}, ScalarType::Float);
  Tensor dB = wanted(need_dB, {N, R}, ScalarType::Float);
  Tensor dbias = wanted(need_dbias, {N}, ScalarType::Float);

  LoraLinearBwd p{};
  p.tiles = tile_sizes();
  p.M = M;
  p.R = R;
  p.weight = weight;
  p.x_dtype = dtype_of(x, "x");
  p.adapter_dtype = dtype_of(A, "lora_A");
  p.dy = dy.data_ptr();
  p.lddy = row_stride(dy);
  p.x = x.data_ptr();
  p.ldx = row_stride(x);
  p.lora_A = A.data_ptr();
  p.lora_B = B.data_ptr();
  p.S = static_cast<const float*>(S.data_ptr());
  p.scaling = static_cast<float>(scaling);
  p.dropout = dropout_of(dropout_p, seed);
  p.dx = need_dx ? dx.data_ptr() : nullptr;
  p.dA = need_dA ? static_cast<float*>(dA.data_ptr()) : nullptr;
  p.dB = need_dB ? static_cast<float*>(dB.data_ptr()) : nullptr;
  p.dbias = need_dbias ? static_cast<float*>(dbias.data_ptr()) : nullptr;
  kernels().lora_linear_bwd(p, parallel_for());
  if (need_dA) dA = torch::stable::to(dA, A.scalar_type());
  if (need_dB) dB = torch::stable::to(dB, B.scalar_type());
  return {dx, dA, dB, dbias};
}

// ---- the ops, in the order of their schemas ----------------------------------------------------

std::tuple<Tensor, Tensor> lora_linear_fwd(Tensor x, Tensor weight, OptionalTensor bias,
                                           Tensor lora_A, Tensor lora_B, double scaling,
                                           double dropout_p, OptionalTensor seed) {
  const Tensor dense = dense_weight(weight, x);
  return forward(x, weight_of(dense), bias, lora_A, lora_B, scaling, dropout_p, seed);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(Tensor dy, Tensor x, Tensor weight,
                                                           Tensor lora_A, Tensor lora_B, Tensor S,
                                                           double scaling, double dropout_p,
                                                           OptionalTensor seed, bool need_dx,
                                                           bool need_dA, bool need_dB,
                                                           bool need_dbias) {
  const Tensor dense = dense_weight(weight, x);
  return backward(dy, x, weight_of(dense), lora_A, lora_B, S, scaling, dropout_p, seed, need_dx,
                  need_dA, need_dB, need_dbias);
}

std::tuple<Tensor, Tensor> qlora_linear_fwd(Tensor x, Tensor weight, Tensor absmax, Tensor code,
                                            OptionalTensor nested_absmax,
                                            OptionalTensor nested_code,
                                            OptionalTensor nested_offset, int64_t blocksize,
                                            ScalarType compute_dtype, OptionalTensor bias,
                                            Tensor lora_A, Tensor lora_B, double scaling,
                                            double dropout_p, OptionalTensor seed) {
  const QuantTensors quant{weight,      absmax,        code,     nested_absmax,
                           nested_code, nested_offset, blocksize};
  const Weight packed = weight_of(quant, lora_B.size(0), x.size(1), compute_dtype);
  return forward(x, packed, bias, lora_A, lora_B, scaling, dropout_p, seed);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qlora_linear_bwd(
    Tensor dy, Tensor x, Tensor weight, Tensor absmax, Tensor code, OptionalTensor nested_absmax,
    OptionalTensor nested_code, OptionalTensor nested_offset, int64_t blocksize,
    ScalarType compute_dtype, Tensor lora_A, Tensor lora_B, Tensor S, double scaling,
    double dropout_p, OptionalTensor seed, bool need_dx, bool need_dA, bool need_dB,
    bool need_dbias) {
  const QuantTensors quant{weight,      absmax,        code,     nested_absmax,
                           nested_code, nested_offset, blocksize};
  const Weight packed = weight_of(quant, lora_B.size(0), x.size(1), compute_dtype);
  return backward(dy, x, packed, lora_A, lora_B, S, scaling, dropout_p, seed, need_dx, need_dA,
                  need_dB, need_dbias);
}

std::tuple<Tensor, Tensor> quantize_4bit(Tensor weight, Tensor bounds, Tensor order,
                                         int64_t blocksize) {
  const Quantisation q(weight, bounds, order, blocksize);
  kernels().quantize_4bit(q.params, parallel_for());
  return {q.packed, q.absmax};
}

void dequantize_4bit_out(Tensor weight, Tensor absmax, Tensor code, OptionalTensor nested_absmax,
                         OptionalTensor nested_code, OptionalTensor nested_offset,
                         int64_t blocksize, Tensor out) {
  const QuantTensors quant{weight,      absmax,        code,     nested_absmax,
                           nested_code, nested_offset, blocksize};
  kernels().dequantize_4bit(dequantisation_of(quant, out), parallel_for());
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY(fastlora, m) {
  m.def("lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, " FASTLORA_LORA FASTLORA_DROPOUT
        ") -> (Tensor y, Tensor S)");
  m.def("lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, " FASTLORA_LORA
        "Tensor S, " FASTLORA_DROPOUT FASTLORA_NEEDS
        ") -> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)");
  m.def("qlora_linear_fwd(Tensor x, " FASTLORA_QUANT
        "ScalarType compute_dtype, Tensor? bias, " FASTLORA_LORA FASTLORA_DROPOUT
        ") -> (Tensor y, Tensor S)");
  m.def("qlora_linear_bwd(Tensor dy, Tensor x, " FASTLORA_QUANT
        "ScalarType compute_dtype, " FASTLORA_LORA "Tensor S, " FASTLORA_DROPOUT FASTLORA_NEEDS
        ") -> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)");
  m.def(FASTLORA_QUANTIZE_4BIT);
  m.def(FASTLORA_DEQUANTIZE_4BIT_OUT);
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&fastlora::lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&fastlora::lora_linear_bwd));
  m.impl("qlora_linear_fwd", TORCH_BOX(&fastlora::qlora_linear_fwd));
  m.impl("qlora_linear_bwd", TORCH_BOX(&fastlora::qlora_linear_bwd));
  m.impl("quantize_4bit", TORCH_BOX(&fastlora::quantize_4bit));
  m.impl("dequantize_4bit_out", TORCH_BOX(&fastlora::dequantize_4bit_out));
}
