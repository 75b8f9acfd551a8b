// torch.ops.fastlora.*: schemas and CPU implementations, on torch's stable ABI.
//
// Formulas, shapes and dtypes: fastlora/reference/. The ops allocate what they return; a gradient
// that is not asked for comes back as an empty tensor.
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/linear/experts.h"
#include "cpu/runtime/kernels.h"
#include "cpu/runtime/tile_sizes.h"
#include "parallel.h"
#include "schemas.h"

namespace fastlora {
namespace {

Tensor dense_weight(const Tensor& weight, const Tensor& x) {
  check_matrix(weight, "weight", weight.size(0), x.size(1));
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  return with_order(weight);
}

// How many experts a stack has; none: a plain layer.
using ExpertCount = std::optional<int64_t>;

void check_adapter(const Tensor& t, const char* name, ExpertCount experts, int64_t rows,
                   int64_t columns) {
  if (!experts) return check_matrix(t, name, rows, columns);
  STD_TORCH_CHECK(
      t.dim() == 3 && t.size(0) == *experts && t.size(1) == rows && t.size(2) == columns, name,
      " must be [", *experts, ", ", rows, ", ", columns, "]");
}

void check_adapters(const Tensor& A, const Tensor& B, ExpertCount experts, const Weight& weight) {
  const int64_t R = A.size(experts ? 1 : 0);
  check_adapter(A, "lora_A", experts, R, weight.K);
  check_adapter(B, "lora_B", experts, weight.N, R);
  STD_TORCH_CHECK(A.scalar_type() == B.scalar_type(), "lora_B must have lora_A's dtype");
}

// One layer of a forward, or a stack of experts: what `params` points into, and what it writes.
struct Forward {
  // x has contiguous rows.
  Forward(const Tensor& x, const Weight& weight, ExpertCount experts,
          const OptionalTensor& bias_any, const Tensor& A_any, const Tensor& B_any, double scaling,
          double dropout_p, const OptionalTensor& seed, const TileSizes& tiles) {
    const int64_t M = x.size(0), R = A_any.size(experts ? 1 : 0);
    check_not_empty(weight);
    check_matrix(x, "x", M, weight.K);
    check_adapters(A_any, B_any, experts, weight);
    A = torch::stable::contiguous(A_any);
    B = torch::stable::contiguous(B_any);
    y = empty(x, {M, weight.N});
    S = empty(x, {M, R}, ScalarType::Float);

    params.tiles = tiles;
    params.M = M;
    params.R = R;
    params.weight = weight;
    params.x_dtype = dtype_of(x, "x");
    params.adapter_dtype = dtype_of(A, "lora_A");
    params.x = x.data_ptr();
    params.ldx = row_stride(x);
    if (bias_any.has_value()) {
      bias = torch::stable::contiguous(*bias_any);
      check_vector(*bias, "bias", weight.N);
      params.bias_dtype = dtype_of(*bias, "bias");
      params.bias = bias->data_ptr();
    }
    params.lora_A = A.data_ptr();
    params.lora_B = B.data_ptr();
    params.scaling = static_cast<float>(scaling);
    params.dropout = dropout_of(dropout_p, seed);
    params.y = y.data_ptr();
    params.S = static_cast<float*>(S.data_ptr());
  }
  Tensor A, B, y, S;
  OptionalTensor bias;
  LoraLinearFwd params{};
};

std::tuple<Tensor, Tensor> forward(const Tensor& x_any, const Weight& weight,
                                   const OptionalTensor& bias, const Tensor& A, const Tensor& B,
                                   double scaling, double dropout_p, const OptionalTensor& seed) {
  const Tensor x = with_contiguous_rows(x_any);
  Forward layer(x, weight, std::nullopt, bias, A, B, scaling, dropout_p, seed, tile_sizes());
  kernels().lora_linear_fwd({&layer.params, 1}, parallel_for());
  return {layer.y, layer.S};
}

// Which gradients a backward computes.
struct Needs {
  bool dx, dA, dB, dbias;
};

// One layer of a backward, or a stack of experts: what `params` points into, and what it writes,
// but dx.
struct Backward {
  // x has contiguous rows. A stack may lack x and S, which are then null. dx is null where it is not
  // needed.
  Backward(const Tensor& dy_any, const Tensor* x, const Weight& weight, ExpertCount experts,
           const Tensor& A_any, const Tensor& B_any, const Tensor* S_any, double scaling,
           double dropout_p, const OptionalTensor& seed, const Needs& needs, void* dx,
           const TileSizes& tiles) {
    const int64_t M = experts ? dy_any.size(0) : x->size(0), R = A_any.size(experts ? 1 : 0);
    const int64_t N = weight.N, K = weight.K;
    check_not_empty(weight);
    if (x) check_matrix(*x, "x", M, K);
    check_matrix(dy_any, "dy", M, N);
    check_adapters(A_any, B_any, experts, weight);
    if (S_any) {
      check_matrix(*S_any, "S", M, R);
      check_dtype(*S_any, "S", ScalarType::Float);
      S = torch::stable::contiguous(*S_any);
    }
    STD_TORCH_CHECK(x == nullptr || dy_any.scalar_type() == x->scalar_type(),
                    "dy must have x's dtype");
    dy = with_contiguous_rows(dy_any);
    A = torch::stable::contiguous(A_any);
    B = torch::stable::contiguous(B_any);
    const auto gradient = [&](bool needed, int64_t rows, int64_t columns) {
      return experts ? wanted(dy, needed, {*experts, rows, columns}, ScalarType::Float)
                     : wanted(dy, needed, {rows, columns}, ScalarType::Float);
    };
    dA = gradient(needs.dA, R, K);
    dB = gradient(needs.dB, N, R);
    dbias = wanted(dy, needs.dbias, {N}, ScalarType::Float);

    params.tiles = tiles;
    params.M = M;
    params.R = R;
    params.weight = weight;
    params.x_dtype = dtype_of(dy, "dy");
    params.adapter_dtype = dtype_of(A, "lora_A");
    params.dy = dy.data_ptr();
    params.lddy = row_stride(dy);
    if (x) {
      params.x = x->data_ptr();
      params.ldx = row_stride(*x);
    }
    params.lora_A = A.data_ptr();
    params.lora_B = B.data_ptr();
    if (S_any) params.S = static_cast<const float*>(S.data_ptr());
    params.scaling = static_cast<float>(scaling);
    params.dropout = dropout_of(dropout_p, seed);
    params.dx = dx;
    params.dA = needs.dA ? static_cast<float*>(dA.data_ptr()) : nullptr;
    params.dB = needs.dB ? static_cast<float*>(dB.data_ptr()) : nullptr;
    params.dbias = needs.dbias ? static_cast<float*>(dbias.data_ptr()) : nullptr;
  }
  // Gradients of the adapters come in the adapters' own dtype.
  void finish() {
    if (params.dA) dA = torch::stable::to(dA, A.scalar_type());
    if (params.dB) dB = torch::stable::to(dB, B.scalar_type());
  }
  Tensor dy, A, B, S, dA, dB, dbias;
  LoraLinearBwd params{};
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x_any,
                                                    const Weight& weight, const Tensor& A,
                                                    const Tensor& B, const Tensor& S,
                                                    double scaling, double dropout_p,
                                                    const OptionalTensor& seed, bool need_dx,
                                                    bool need_dA, bool need_dB, bool need_dbias) {
  const Tensor x = with_contiguous_rows(x_any);
  const Tensor dx = wanted(x, need_dx, {x.size(0), weight.K}, std::nullopt);
  Backward layer(dy, &x, weight, std::nullopt, A, B, &S, scaling, dropout_p, seed,
                 {need_dx, need_dA, need_dB, need_dbias}, need_dx ? dx.data_ptr() : nullptr,
                 tile_sizes());
  kernels().lora_linear_bwd({&layer.params, 1}, parallel_for());
  layer.finish();
  return {dx, layer.dA, layer.dB, layer.dbias};
}

// ---- stacks of experts -------------------------------------------------------------------------

Tensor dense_stack(const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(weight.dim() == 3, "weight must be [E, N, K]");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  return torch::stable::contiguous(weight);
}

// E weights, of which `dense` or `quant` points to expert 0.
struct Stack {
  int64_t E;
  Weight weight;
};

Stack stack_of(const Tensor& dense) {
  Weight weight{};
  weight.N = dense.size(1);
  weight.K = dense.size(2);
  weight.dense = dense.data_ptr();
  weight.compute_dtype = dtype_of(dense, "weight");
  check_not_empty(weight);
  return {dense.size(0), weight};
}

Stack stack_of(const QuantTensors& quant, int64_t E, int64_t N, int64_t K,
               ScalarType compute_dtype) {
  Weight weight{};
  weight.N = N;
  weight.K = K;
  weight.quant = quant_of(quant, E * N * K);
  weight.compute_dtype = dtype_of(compute_dtype, "compute_dtype");
  check_not_empty(weight);
  const int64_t together = quant.blocksize * (quant.nested_absmax.has_value() ? kNestedBlock : 1);
  STD_TORCH_CHECK(N * K % together == 0, "each expert must have whole blocks of ", together,
                  " elements, got ", N, " x ", K);
  return {E, weight};
}

Segments checked_segments(const Tensor& offsets, int64_t E, int64_t M) {
  check_vector(offsets, "offsets", E);
  check_dtype(offsets, "offsets", ScalarType::Long);
  const int64_t* ends = static_cast<const int64_t*>(offsets.data_ptr());
  for (int64_t e = 0; e < E; e++) {
    const int64_t before = e ? ends[e - 1] : 0;
    STD_TORCH_CHECK(before <= ends[e] && ends[e] <= M, "offsets must ascend from 0 to at most ", M,
                    ", got ", ends[e], " after ", before);
  }
  return segments_of(ends, E);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_any, const Stack& stack, const Tensor& offsets,
                                   const Tensor& A, const Tensor& B, double scaling,
                                   double dropout_p, const OptionalTensor& seed) {
  const Tensor x = with_contiguous_rows(x_any);
  Forward layers(x, stack.weight, stack.E, std::nullopt, A, B, scaling, dropout_p, seed,
                 tile_sizes());
  each_expert_fwd(kernels(), layers.params, checked_segments(offsets, stack.E, x.size(0)),
                  threads());
  return {layers.y, layers.S};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const OptionalTensor& x_any,
                                            const Stack& stack, const Tensor& offsets,
                                            const Tensor& A, const Tensor& B,
                                            const OptionalTensor& S, double scaling,
                                            double dropout_p, const OptionalTensor& seed,
                                            bool need_dx, bool need_dA, bool need_dB) {
  STD_TORCH_CHECK(x_any.has_value() || !need_dA, "x must be given where dA is needed");
  STD_TORCH_CHECK(S.has_value() || !need_dB, "S must be given where dB is needed");
  OptionalTensor x;
  if (x_any.has_value()) x = with_contiguous_rows(*x_any);
  const Tensor dx = wanted(dy, need_dx, {dy.size(0), stack.weight.K}, std::nullopt);
  Backward layers(dy, x ? &*x : nullptr, stack.weight, stack.E, A, B, S ? &*S : nullptr, scaling,
                  dropout_p, seed, {need_dx, need_dA, need_dB, false},
                  need_dx ? dx.data_ptr() : nullptr, tile_sizes());
  each_expert_bwd(kernels(), layers.params, checked_segments(offsets, stack.E, dy.size(0)),
                  threads());
  layers.finish();
  return {dx, layers.dA, layers.dB};
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

// Layers that read one x, as lists. `tensors` has those of `Field` for each layer, in this order; the
// last five are null where the weight is dense.
struct Layers {
  enum Field {
    weight,
    lora_A,
    lora_B,
    bias,
    seed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    kFields
  };
  std::vector<OptionalTensor> tensors;
  std::vector<int64_t> blocksizes;
  ScalarType compute_dtype;
  std::vector<double> scalings, dropouts;
  std::vector<Tensor> dense;  // what a dense `Weight` points into

  Layers(std::vector<OptionalTensor> all, std::vector<int64_t> sizes, ScalarType compute,
         std::vector<double> scales, std::vector<double> rates)
      : tensors(std::move(all)),
        blocksizes(std::move(sizes)),
        compute_dtype(compute),
        scalings(std::move(scales)),
        dropouts(std::move(rates)) {
    STD_TORCH_CHECK(count() > 0 && tensors.size() == count() * kFields &&
                        dropouts.size() == count() && blocksizes.size() == count(),
                    "layers must have ", static_cast<int>(kFields), " tensors for each scaling");
    dense.reserve(count());
  }
  size_t count() const { return scalings.size(); }
  const OptionalTensor& get(size_t i, Field field) const { return tensors[i * kFields + field]; }
  const Tensor& must(size_t i, Field field) const {
    STD_TORCH_CHECK(get(i, field).has_value(), "layers must have a weight, lora_A and lora_B, and ",
                    "4-bit ones absmax and code");
    return *get(i, field);
  }
  Weight weight_at(size_t i, const Tensor& x) {
    if (!get(i, absmax).has_value()) {
      STD_TORCH_CHECK(!get(0, absmax).has_value(), "layers must be all dense or all 4-bit");
      dense.push_back(dense_weight(must(i, weight), x));
      STD_TORCH_CHECK(is_transposed(dense.back()) == is_transposed(dense.front()),
                      "layers must all be stored [N, K] or all [K, N]");
      return weight_of(dense.back());
    }
    STD_TORCH_CHECK(get(0, absmax).has_value(), "layers must be all dense or all 4-bit");
    const QuantTensors quant{must(i, weight),       must(i, absmax),     must(i, code),
                             get(i, nested_absmax), get(i, nested_code), get(i, nested_offset),
                             blocksizes[i]};
    return weight_of(quant, must(i, lora_B).size(0), x.size(1), compute_dtype);
  }
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>> shared_linear_fwd(
    Tensor x_any, std::vector<OptionalTensor> tensors, std::vector<int64_t> blocksizes,
    ScalarType compute_dtype, std::vector<double> scalings, std::vector<double> dropouts) {
  Layers layers(std::move(tensors), std::move(blocksizes), compute_dtype, std::move(scalings),
                std::move(dropouts));
  const Tensor x = with_contiguous_rows(x_any);
  std::vector<Forward> each;
  std::vector<LoraLinearFwd> params;
  const TileSizes tiles = tile_sizes();  // one choice for all
  for (size_t i = 0; i < layers.count(); i++) {
    each.emplace_back(x, layers.weight_at(i, x), std::nullopt, layers.get(i, Layers::bias),
                      layers.must(i, Layers::lora_A), layers.must(i, Layers::lora_B),
                      layers.scalings[i], layers.dropouts[i], layers.get(i, Layers::seed), tiles);
    params.push_back(each.back().params);
  }
  kernels().lora_linear_fwd({params.data(), static_cast<int64_t>(params.size())}, parallel_for());
  std::vector<Tensor> ys, Ss;
  for (const Forward& layer : each) {
    ys.push_back(layer.y);
    Ss.push_back(layer.S);
  }
  return {ys, Ss};
}

std::tuple<Tensor, std::vector<Tensor>> shared_linear_bwd(
    std::vector<Tensor> dys, Tensor x_any, std::vector<OptionalTensor> tensors,
    std::vector<int64_t> blocksizes, ScalarType compute_dtype, std::vector<Tensor> Ss,
    std::vector<double> scalings, std::vector<double> dropouts, bool need_dx,
    std::vector<int64_t> needs) {
  Layers layers(std::move(tensors), std::move(blocksizes), compute_dtype, std::move(scalings),
                std::move(dropouts));
  STD_TORCH_CHECK(dys.size() == layers.count() && Ss.size() == layers.count() &&
                      needs.size() == 3 * layers.count(),
                  "dys and Ss must have one entry, needs three, for each scaling");
  const Tensor x = with_contiguous_rows(x_any);
  const Tensor dx = wanted(x, need_dx, {x.size(0), x.size(1)}, std::nullopt);
  std::vector<Backward> each;
  std::vector<LoraLinearBwd> params;
  const TileSizes tiles = tile_sizes();
  for (size_t i = 0; i < layers.count(); i++) {
    const Needs asked{need_dx, needs[3 * i] != 0, needs[3 * i + 1] != 0, needs[3 * i + 2] != 0};
    each.emplace_back(dys[i], &x, layers.weight_at(i, x), std::nullopt,
                      layers.must(i, Layers::lora_A), layers.must(i, Layers::lora_B), &Ss[i],
                      layers.scalings[i], layers.dropouts[i], layers.get(i, Layers::seed), asked,
                      need_dx ? dx.data_ptr() : nullptr, tiles);
    params.push_back(each.back().params);
  }
  kernels().lora_linear_bwd({params.data(), static_cast<int64_t>(params.size())}, parallel_for());
  std::vector<Tensor> grads;
  for (Backward& layer : each) {
    layer.finish();
    for (const Tensor& grad : {layer.dA, layer.dB, layer.dbias}) grads.push_back(grad);
  }
  return {dx, grads};
}

std::tuple<Tensor, Tensor> grouped_lora_linear_fwd(Tensor x, Tensor weight, Tensor offsets,
                                                   Tensor lora_A, Tensor lora_B, double scaling,
                                                   double dropout_p, OptionalTensor seed) {
  const Tensor dense = dense_stack(weight, x);
  return forward(x, stack_of(dense), offsets, lora_A, lora_B, scaling, dropout_p, seed);
}

std::tuple<Tensor, Tensor, Tensor> grouped_lora_linear_bwd(
    Tensor dy, OptionalTensor x, Tensor weight, Tensor offsets, Tensor lora_A, Tensor lora_B,
    OptionalTensor S, double scaling, double dropout_p, OptionalTensor seed, bool need_dx,
    bool need_dA, bool need_dB) {
  const Tensor dense = dense_stack(weight, dy);
  return backward(dy, x, stack_of(dense), offsets, lora_A, lora_B, S, scaling, dropout_p, seed,
                  need_dx, need_dA, need_dB);
}

std::tuple<Tensor, Tensor> grouped_qlora_linear_fwd(Tensor x, Tensor weight, Tensor absmax,
                                                    Tensor code, OptionalTensor nested_absmax,
                                                    OptionalTensor nested_code,
                                                    OptionalTensor nested_offset, int64_t blocksize,
                                                    ScalarType compute_dtype, Tensor offsets,
                                                    Tensor lora_A, Tensor lora_B, double scaling,
                                                    double dropout_p, OptionalTensor seed) {
  const QuantTensors quant{weight,      absmax,        code,     nested_absmax,
                           nested_code, nested_offset, blocksize};
  const Stack stack = stack_of(quant, lora_B.size(0), lora_B.size(1), x.size(1), compute_dtype);
  return forward(x, stack, offsets, lora_A, lora_B, scaling, dropout_p, seed);
}

std::tuple<Tensor, Tensor, Tensor> grouped_qlora_linear_bwd(
    Tensor dy, OptionalTensor x, Tensor weight, Tensor absmax, Tensor code,
    OptionalTensor nested_absmax, OptionalTensor nested_code, OptionalTensor nested_offset,
    int64_t blocksize, ScalarType compute_dtype, Tensor offsets, Tensor lora_A, Tensor lora_B,
    OptionalTensor S, double scaling, double dropout_p, OptionalTensor seed, bool need_dx,
    bool need_dA, bool need_dB) {
  const QuantTensors quant{weight,      absmax,        code,     nested_absmax,
                           nested_code, nested_offset, blocksize};
  const Stack stack =
      stack_of(quant, lora_B.size(0), lora_B.size(1), lora_A.size(2), compute_dtype);
  return backward(dy, x, stack, offsets, lora_A, lora_B, S, scaling, dropout_p, seed, need_dx,
                  need_dA, need_dB);
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

#define FASTLORA_GROUPED_NEEDS ", bool need_dx, bool need_dA, bool need_dB"
#define FASTLORA_LAYERS "Tensor?[] layers, int[] blocksizes, ScalarType compute_dtype, "

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
  m.def("shared_linear_fwd(Tensor x, " FASTLORA_LAYERS
        "float[] scalings, float[] dropouts) -> (Tensor[] ys, Tensor[] Ss)");
  m.def("shared_linear_bwd(Tensor[] dys, Tensor x, " FASTLORA_LAYERS
        "Tensor[] Ss, float[] scalings, float[] dropouts, bool need_dx, int[] needs)"
        " -> (Tensor dx, Tensor[] grads)");
  m.def(
      "grouped_lora_linear_fwd(Tensor x, Tensor weight, Tensor "
      "offsets, " FASTLORA_LORA FASTLORA_DROPOUT ") -> (Tensor y, Tensor S)");
  m.def(
      "grouped_lora_linear_bwd(Tensor dy, Tensor? x, Tensor weight, Tensor offsets, " FASTLORA_LORA
      "Tensor? S, " FASTLORA_DROPOUT FASTLORA_GROUPED_NEEDS
      ") -> (Tensor dx, Tensor dA, Tensor dB)");
  m.def("grouped_qlora_linear_fwd(Tensor x, " FASTLORA_QUANT
        "ScalarType compute_dtype, Tensor offsets, " FASTLORA_LORA FASTLORA_DROPOUT
        ") -> (Tensor y, Tensor S)");
  m.def("grouped_qlora_linear_bwd(Tensor dy, Tensor? x, " FASTLORA_QUANT
        "ScalarType compute_dtype, Tensor offsets, " FASTLORA_LORA
        "Tensor? S, " FASTLORA_DROPOUT FASTLORA_GROUPED_NEEDS
        ") -> (Tensor dx, Tensor dA, Tensor dB)");
  m.def(FASTLORA_QUANTIZE_4BIT);
  m.def(FASTLORA_DEQUANTIZE_4BIT_OUT);
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&fastlora::lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&fastlora::lora_linear_bwd));
  m.impl("qlora_linear_fwd", TORCH_BOX(&fastlora::qlora_linear_fwd));
  m.impl("qlora_linear_bwd", TORCH_BOX(&fastlora::qlora_linear_bwd));
  m.impl("shared_linear_fwd", TORCH_BOX(&fastlora::shared_linear_fwd));
  m.impl("shared_linear_bwd", TORCH_BOX(&fastlora::shared_linear_bwd));
  m.impl("grouped_lora_linear_fwd", TORCH_BOX(&fastlora::grouped_lora_linear_fwd));
  m.impl("grouped_lora_linear_bwd", TORCH_BOX(&fastlora::grouped_lora_linear_bwd));
  m.impl("grouped_qlora_linear_fwd", TORCH_BOX(&fastlora::grouped_qlora_linear_fwd));
  m.impl("grouped_qlora_linear_bwd", TORCH_BOX(&fastlora::grouped_qlora_linear_bwd));
  m.impl("quantize_4bit", TORCH_BOX(&fastlora::quantize_4bit));
  m.impl("dequantize_4bit_out", TORCH_BOX(&fastlora::dequantize_4bit_out));
}
