// torch.ops.fastlora.*: CPU implementations, on torch's stable ABI.
//
// Schemas: fastlora/backends/schemas.py. Formulas, shapes and dtypes: fastlora/reference/. The ops
// allocate what they return; a gradient that is not asked for comes back as an empty tensor.
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/linear/experts.h"
#include "cpu/runtime/kernels.h"
#include "cpu/runtime/tile_sizes.h"
#include "parallel.h"

namespace fastlora {
namespace {

// Sets `dense`, the tensor that the result points into, to a dense stack [E, N, K]. The result has
// the weight of expert 0.
Weight stack_of(const LayerTensors& layer, int64_t E, int64_t N, int64_t K, ScalarType x_dtype,
                Tensor& dense) {
  Weight weight{};
  weight.N = N;
  weight.K = K;
  check_not_empty(weight);
  if (layer.is_dense()) {
    check_stack(layer.weight, "weight", E, N, K);
    FASTLORA_CHECK(layer.weight.scalar_type() == x_dtype, "weight must have x's dtype");
    dense = as_contiguous(layer.weight);
    weight.dense = memory_of(dense);
    weight.compute_dtype = dtype_of(dense, "weight");
    return weight;
  }
  weight.quant = quant_of(layer.quant(), elements_of(E, elements_of(N, K)));
  weight.compute_dtype = dtype_of(layer.compute_dtype.value_or(x_dtype), "compute_dtype");
  const int64_t together = layer.blocksize * (layer.nested_absmax.has_value() ? kNestedBlock : 1);
  FASTLORA_CHECK(N * K % together == 0, "each expert must have whole blocks of ", together,
                 " elements, got ", N, " x ", K);
  return weight;
}

// What a forward and a backward have in common: a layer, or a stack of experts.
struct Operands {
  Operands(const LayerTensors& layer, bool is_stack, ScalarType x_dtype) {
    const Tensor &A_any = layer.lora_A, &B_any = layer.lora_B;
    FASTLORA_CHECK(A_any.dim() == (is_stack ? 3 : 2) && B_any.dim() == A_any.dim(),
                   "lora_A and lora_B must be ", is_stack ? "stacks" : "matrices");
    const int64_t N = B_any.size(is_stack ? 1 : 0), K = A_any.size(is_stack ? 2 : 1);
    if (is_stack) experts = B_any.size(0);
    R = A_any.size(is_stack ? 1 : 0);
    weight = is_stack ? stack_of(layer, *experts, N, K, x_dtype, dense)
                      : weight_of(layer, N, K, x_dtype, dense);
    check_not_empty(weight);
    adapter = Adapter(A_any, B_any, experts, N, K);
  }
  template <class Params>
  void fill(Params& params, const LayerTensors& layer, int64_t M, const TileSizes& tiles) const {
    params.tiles = tiles;
    params.M = M;
    params.R = R;
    params.weight = weight;
    adapter.fill(params, layer.scaling);
    params.dropout = dropout_of(layer.dropout_p, layer.seed);
  }
  ExpertCount experts;
  int64_t R;
  Tensor dense;
  Adapter adapter;
  Weight weight;
};

// One layer of a forward, or a stack of experts: what `params` points into, and what it writes.
struct Forward {
  // x has contiguous rows.
  Forward(const Tensor& x, const LayerTensors& layer, bool is_stack, const TileSizes& tiles)
      : operands(layer, is_stack, x.scalar_type()) {
    const int64_t M = x.size(0), N = operands.weight.N;
    check_matrix(x, "x", M, operands.weight.K);
    y = empty(x, {M, N});
    S = empty(x, {M, operands.R}, ScalarType::Float);

    operands.fill(params, layer, M, tiles);
    params.x_dtype = dtype_of(x, "x");
    params.x = memory_of(x);
    params.ldx = row_stride(x);
    if (layer.bias.has_value()) {
      bias = as_contiguous(*layer.bias);
      check_vector(*bias, "bias", N);
      params.bias_dtype = dtype_of(*bias, "bias");
      params.bias = memory_of(*bias);
    }
    params.y = memory_of(y);
    params.S = data_of<float>(S);
  }
  Operands operands;
  Tensor y, S;
  OptionalTensor bias;
  LoraLinearFwd params{};
};

// Which gradients a backward computes.
struct Needs {
  bool dx, dA, dB, dbias;
};

// One layer of a backward, or a stack of experts: what `params` points into, and what it writes,
// but dx.
struct Backward {
  // x has contiguous rows. A stack may lack x and S, which are then null. dx is null where it is not
  // needed.
  Backward(const Tensor& dy_any, const Tensor* x, const LayerTensors& layer, bool is_stack,
           const Tensor* S_any, const Needs& needs, void* dx, const TileSizes& tiles)
      : operands(layer, is_stack, dy_any.scalar_type()) {
    const int64_t M = x ? x->size(0) : dy_any.size(0), R = operands.R;
    const int64_t N = operands.weight.N, K = operands.weight.K;
    if (x) check_matrix(*x, "x", M, K);
    check_matrix(dy_any, "dy", M, N);
    if (S_any) {
      check_matrix(*S_any, "S", M, R);
      check_dtype(*S_any, "S", ScalarType::Float);
      S = as_contiguous(*S_any);
    }
    FASTLORA_CHECK(x == nullptr || dy_any.scalar_type() == x->scalar_type(),
                   "dy must have x's dtype");
    dy = with_contiguous_rows(dy_any, "dy");
    const auto gradient = [&](bool needed, int64_t rows, int64_t columns) {
      return is_stack ? wanted(dy, needed, {*operands.experts, rows, columns}, ScalarType::Float)
                      : wanted(dy, needed, {rows, columns}, ScalarType::Float);
    };
    dA = gradient(needs.dA, R, K);
    dB = gradient(needs.dB, N, R);
    dbias = wanted(dy, needs.dbias, {N}, ScalarType::Float);

    operands.fill(params, layer, M, tiles);
    params.x_dtype = dtype_of(dy, "dy");
    params.dy = memory_of(dy);
    params.lddy = row_stride(dy);
    if (x) {
      params.x = memory_of(*x);
      params.ldx = row_stride(*x);
    }
    if (S_any) params.S = data_of<const float>(S);
    params.dx = dx;
    params.dA = needs.dA ? data_of<float>(dA) : nullptr;
    params.dB = needs.dB ? data_of<float>(dB) : nullptr;
    params.dbias = needs.dbias ? data_of<float>(dbias) : nullptr;
  }
  // Gradients of the adapters come in the adapters' own dtype.
  void finish() {
    if (params.dA) dA = torch::stable::to(dA, operands.adapter.A.scalar_type());
    if (params.dB) dB = torch::stable::to(dB, operands.adapter.B.scalar_type());
  }
  Operands operands;
  Tensor dy, S, dA, dB, dbias;
  LoraLinearBwd params{};
};

Segments checked_segments(const Tensor& offsets, int64_t E, int64_t M) {
  const int64_t* ends = vector_of<int64_t>(offsets, "offsets", E);
  for (int64_t e = 0; e < E; e++) {
    const int64_t before = e ? ends[e - 1] : 0;
    FASTLORA_CHECK(before <= ends[e] && ends[e] <= M, "offsets must ascend from 0 to at most ", M,
                   ", got ", ends[e], " after ", before);
  }
  return segments_of(ends, E);
}

// ---- the ops, in the order of their schemas ----------------------------------------------------

std::tuple<Tensor, Tensor> lora_linear_fwd(Tensor x_any, FASTLORA_LAYER) {
  const Tensor x = with_contiguous_rows(x_any, "x");
  Forward layer(x, FASTLORA_LAYER_OF, false, tile_sizes());
  kernels().lora_linear_fwd({&layer.params, 1}, parallel_for());
  return {layer.y, layer.S};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(Tensor dy, Tensor x_any, FASTLORA_LAYER,
                                                           Tensor S, bool need_dx, bool need_dA,
                                                           bool need_dB, bool need_dbias) {
  const Tensor x = with_contiguous_rows(x_any, "x");
  const Tensor dx = wanted(x, need_dx, {x.size(0), x.size(1)}, std::nullopt);
  Backward layer(dy, &x, FASTLORA_LAYER_OF, false, &S, {need_dx, need_dA, need_dB, need_dbias},
                 need_dx ? memory_of(dx) : nullptr, tile_sizes());
  kernels().lora_linear_bwd({&layer.params, 1}, parallel_for());
  layer.finish();
  return {dx, layer.dA, layer.dB, layer.dbias};
}

// Layers that read one x, as lists in the order of {LAYERS} in fastlora/backends/schemas.py.
struct Layers {
  std::vector<OptionalTensor> tensors;
  std::vector<int64_t> blocksizes;
  std::optional<ScalarType> compute_dtype;
  std::vector<double> scalings, dropouts;

  size_t count() const { return scalings.size(); }
  LayerTensors operator[](size_t i) const {
    constexpr size_t kFields = 10;
    FASTLORA_CHECK(tensors.size() == count() * kFields && dropouts.size() == count() &&
                       blocksizes.size() == count(),
                   "layers must have ", kFields, " tensors for each scaling");
    const OptionalTensor* t = &tensors[i * kFields];
    FASTLORA_CHECK(t[0].has_value() && t[7].has_value() && t[8].has_value(),
                   "layers must have a weight, lora_A and lora_B");
    return {*t[0],         t[1], t[2],  t[3],  t[4],        t[5],        blocksizes[i],
            compute_dtype, t[6], *t[7], *t[8], scalings[i], dropouts[i], t[9]};
  }
  // One kernel call decodes or reads the weights of all layers alike.
  void check_alike(const LayerTensors& layer) const {
    const LayerTensors first = (*this)[0];
    FASTLORA_CHECK(layer.is_dense() == first.is_dense(), "layers must be all dense or all 4-bit");
    FASTLORA_CHECK(!layer.is_dense() || is_transposed(layer.weight) == is_transposed(first.weight),
                   "layers must all be stored [N, K] or all [K, N]");
  }
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>> shared_linear_fwd(
    Tensor x_any, std::vector<OptionalTensor> tensors, std::vector<int64_t> blocksizes,
    std::optional<ScalarType> compute_dtype, std::vector<double> scalings,
    std::vector<double> dropouts) {
  const Layers layers{std::move(tensors), std::move(blocksizes), compute_dtype, std::move(scalings),
                      std::move(dropouts)};
  FASTLORA_CHECK(layers.count() > 0, "layers must have one layer at least");
  const Tensor x = with_contiguous_rows(x_any, "x");
  std::vector<Forward> each;
  std::vector<LoraLinearFwd> params;
  const TileSizes tiles = tile_sizes();  // one choice for all
  for (size_t i = 0; i < layers.count(); i++) {
    const LayerTensors layer = layers[i];
    layers.check_alike(layer);
    each.emplace_back(x, layer, false, tiles);
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
    std::vector<int64_t> blocksizes, std::optional<ScalarType> compute_dtype,
    std::vector<double> scalings, std::vector<double> dropouts, std::vector<Tensor> Ss,
    bool need_dx, std::vector<int64_t> needs) {
  const Layers layers{std::move(tensors), std::move(blocksizes), compute_dtype, std::move(scalings),
                      std::move(dropouts)};
  FASTLORA_CHECK(layers.count() > 0, "layers must have one layer at least");
  FASTLORA_CHECK(dys.size() == layers.count() && Ss.size() == layers.count() &&
                     needs.size() == 3 * layers.count(),
                 "dys and Ss must have one entry, needs three, for each scaling");
  const Tensor x = with_contiguous_rows(x_any, "x");
  const Tensor dx = wanted(x, need_dx, {x.size(0), x.size(1)}, std::nullopt);
  std::vector<Backward> each;
  std::vector<LoraLinearBwd> params;
  const TileSizes tiles = tile_sizes();
  for (size_t i = 0; i < layers.count(); i++) {
    const Needs asked{need_dx, needs[3 * i] != 0, needs[3 * i + 1] != 0, needs[3 * i + 2] != 0};
    const LayerTensors layer = layers[i];
    layers.check_alike(layer);
    each.emplace_back(dys[i], &x, layer, false, &Ss[i], asked, need_dx ? memory_of(dx) : nullptr,
                      tiles);
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

std::tuple<Tensor, Tensor> grouped_lora_linear_fwd(Tensor x_any, FASTLORA_LAYER, Tensor offsets) {
  FASTLORA_CHECK(!bias.has_value(), "experts have no bias");
  const Tensor x = with_contiguous_rows(x_any, "x");
  Forward layers(x, FASTLORA_LAYER_OF, true, tile_sizes());
  const Segments segments = checked_segments(offsets, *layers.operands.experts, x.size(0));
  each_expert_fwd(kernels(), layers.params, segments, threads());
  return {layers.y, layers.S};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grouped_lora_linear_bwd(Tensor dy, OptionalTensor x_any,
                                                                   FASTLORA_LAYER, Tensor offsets,
                                                                   OptionalTensor S, bool need_dx,
                                                                   bool need_dA, bool need_dB,
                                                                   bool need_dbias) {
  FASTLORA_CHECK(!need_dbias, "experts have no bias");
  FASTLORA_CHECK(x_any.has_value() || !need_dA, "x must be given where dA is needed");
  FASTLORA_CHECK(S.has_value() || !need_dB, "S must be given where dB is needed");
  OptionalTensor x;
  if (x_any.has_value()) x = with_contiguous_rows(*x_any, "x");
  FASTLORA_CHECK(lora_A.dim() == 3, "lora_A must be a stack");
  const int64_t M = sizes_of(dy, "dy").rows;
  const Tensor dx = wanted(dy, need_dx, {M, lora_A.size(2)}, std::nullopt);
  Backward layers(dy, x ? &*x : nullptr, FASTLORA_LAYER_OF, true, S ? &*S : nullptr,
                  {need_dx, need_dA, need_dB, false}, need_dx ? memory_of(dx) : nullptr,
                  tile_sizes());
  const Segments segments = checked_segments(offsets, *layers.operands.experts, M);
  each_expert_bwd(kernels(), layers.params, segments, threads());
  layers.finish();
  return {dx, layers.dA, layers.dB, layers.dbias};
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

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&fastlora::lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&fastlora::lora_linear_bwd));
  m.impl("shared_linear_fwd", TORCH_BOX(&fastlora::shared_linear_fwd));
  m.impl("shared_linear_bwd", TORCH_BOX(&fastlora::shared_linear_bwd));
  m.impl("grouped_lora_linear_fwd", TORCH_BOX(&fastlora::grouped_lora_linear_fwd));
  m.impl("grouped_lora_linear_bwd", TORCH_BOX(&fastlora::grouped_lora_linear_bwd));
  m.impl("quantize_4bit", TORCH_BOX(&fastlora::quantize_4bit));
  m.impl("dequantize_4bit_out", TORCH_BOX(&fastlora::dequantize_4bit_out));
}
