// torch.ops.fastlora.*: schemas and CPU implementations, on torch's stable ABI.
//
// Formulas, shapes and dtypes: fastlora/reference.py. The ops allocate what they return; a gradient
// that is not asked for comes back as an empty tensor.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/tile_sizes.h"

namespace fastlora {
namespace {

// Tiles are handed out a few at a time, in the end one by one, so that a thread that was held up does
// not hold up the others.
const ParallelFor& parallel_for() {
  static const ParallelFor parallel = {[](int64_t tiles, int64_t neighbours,
                                          void (*body)(const void*, int64_t, int64_t),
                                          const void* context) {
    const int64_t threads =
        std::min<int64_t>(tiles, static_cast<int64_t>(torch::stable::get_num_threads()));
    if (tiles <= 0) return;
    // One thread needs no pool, which a forked worker of a DataLoader would not have.
    if (threads <= 1) {
      body(context, 0, tiles);
      return trim_scratch(Scratch::local);
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t begin = next; begin < tiles;) {
        const int64_t fair = std::max<int64_t>(1, (tiles - begin) / (2 * threads));
        const int64_t end = begin + std::min(neighbours, fair);
        if (next.compare_exchange_weak(begin, end)) {
          body(context, begin, end);
          begin = next;
        }
      }
      trim_scratch(Scratch::local);
    });
  }};
  return parallel;
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes,
             std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

Tensor dense_weight(const Tensor& weight, const Tensor& x) {
  check_matrix(weight, "weight", weight.size(0), x.size(1));
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  return torch::stable::contiguous(weight);
}

Weight weight_of(const Tensor& dense) {
  Weight weight{};
  weight.N = dense.size(0);
  weight.K = dense.size(1);
  weight.dense = dense.data_ptr();
  weight.compute_dtype = dtype_of(dense, "weight");
  return weight;
}

Weight weight_of(const QuantTensors& quant, int64_t N, int64_t K, ScalarType compute_dtype) {
  Weight weight{};
  weight.N = N;
  weight.K = K;
  weight.quant = quant_of(quant, N * K);
  weight.compute_dtype = dtype_of(compute_dtype, "compute_dtype");
  return weight;
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

std::tuple<Tensor, Tensor> quantize_4bit(Tensor weight_any, Tensor bounds, Tensor order,
                                         int64_t blocksize) {
  const Tensor weight = torch::stable::contiguous(weight_any);
  const int64_t elements = weight.numel();
  STD_TORCH_CHECK(blocksize >= 32 && blocksize % 2 == 0, "blocksize must be even and at least 32");
  check_vector(bounds, "bounds", 15);
  check_dtype(bounds, "bounds", ScalarType::Float);
  check_vector(order, "order", 16);
  check_dtype(order, "order", ScalarType::Byte);
  Tensor packed = empty(weight, {(elements + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = empty(weight, {(elements + blocksize - 1) / blocksize}, ScalarType::Float);
  Quantize4bit p{};
  p.elements = elements;
  p.blocksize = blocksize;
  p.dtype = dtype_of(weight, "weight");
  p.weight = weight.data_ptr();
  p.bounds = static_cast<const float*>(bounds.data_ptr());
  p.order = static_cast<const uint8_t*>(order.data_ptr());
  p.packed = static_cast<uint8_t*>(packed.data_ptr());
  p.absmax = static_cast<float*>(absmax.data_ptr());
  kernels().quantize_4bit(p, parallel_for());
  return {packed, absmax};
}

Tensor dequantize_4bit_out(Tensor weight, Tensor absmax, Tensor code, OptionalTensor nested_absmax,
                           OptionalTensor nested_code, OptionalTensor nested_offset,
                           int64_t blocksize, Tensor out) {
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  const QuantTensors quant{weight,      absmax,        code,     nested_absmax,
                           nested_code, nested_offset, blocksize};
  Dequantize4bit p{};
  p.elements = out.numel();
  p.quant = quant_of(quant, p.elements);
  p.dtype = dtype_of(out, "out");
  p.out = out.data_ptr();
  kernels().dequantize_4bit(p, parallel_for());
  return out;
}

}  // namespace
}  // namespace fastlora

#define FASTLORA_QUANT                                                 \
  "Tensor weight, Tensor absmax, Tensor code, Tensor? nested_absmax, " \
  "Tensor? nested_code, Tensor? nested_offset, int blocksize, "
#define FASTLORA_LORA "Tensor lora_A, Tensor lora_B, "
#define FASTLORA_DROPOUT "float scaling, float dropout_p, Tensor? seed"
#define FASTLORA_NEEDS ", bool need_dx, bool need_dA, bool need_dB, bool need_dbias"

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
  m.def(
      "quantize_4bit(Tensor weight, Tensor bounds, Tensor order, int blocksize)"
      " -> (Tensor packed, Tensor absmax)");
  m.def("dequantize_4bit_out(" FASTLORA_QUANT "Tensor(a!) out) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&fastlora::lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&fastlora::lora_linear_bwd));
  m.impl("qlora_linear_fwd", TORCH_BOX(&fastlora::qlora_linear_fwd));
  m.impl("qlora_linear_bwd", TORCH_BOX(&fastlora::qlora_linear_bwd));
  m.impl("quantize_4bit", TORCH_BOX(&fastlora::quantize_4bit));
  m.impl("dequantize_4bit_out", TORCH_BOX(&fastlora::dequantize_4bit_out));
}
