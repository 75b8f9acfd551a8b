// torch.ops.fastlora.*: CPU implementations, on torch's stable ABI.
//
// Schemas: fastlora/backends/schemas.py. Formulas, shapes and dtypes: fastlora/reference/. The ops allocate what they return; a gradient
// that is not asked for comes back as an empty tensor.
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/runtime/kernels.h"
#include "cpu/runtime/tile_sizes.h"
#include "parallel.h"

namespace fastlora {
namespace {

// One layer of a forward: what `params` points into, and what it writes.
struct Forward {
  // x has contiguous rows.
  Forward(const Tensor& x, const LayerTensors& layer, const TileSizes& tiles) {
    const Tensor &A_any = layer.lora_A, &B_any = layer.lora_B;
    const int64_t M = x.size(0), R = A_any.size(0);
    const Weight weight = weight_of(layer, B_any.size(0), x.size(1), x.scalar_type(), dense);
    check_not_empty(weight);
    check_matrix(x, "x", M, weight.K);
    check_matrix(A_any, "lora_A", R, weight.K);
    check_matrix(B_any, "lora_B", weight.N, R);
    STD_TORCH_CHECK(A_any.scalar_type() == B_any.scalar_type(), "lora_B must have lora_A's dtype");
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
    if (layer.bias.has_value()) {
      bias = torch::stable::contiguous(*layer.bias);
      check_vector(*bias, "bias", weight.N);
      params.bias_dtype = dtype_of(*bias, "bias");
      params.bias = bias->data_ptr();
    }
    params.lora_A = A.data_ptr();
    params.lora_B = B.data_ptr();
    params.scaling = static_cast<float>(layer.scaling);
    params.dropout = dropout_of(layer.dropout_p, layer.seed);
    params.y = y.data_ptr();
    params.S = static_cast<float*>(S.data_ptr());
  }
  Tensor dense, A, B, y, S;
  OptionalTensor bias;
  LoraLinearFwd params{};
};

// Which gradients a backward computes.
struct Needs {
  bool dx, dA, dB, dbias;
};

// One layer of a backward: what `params` points into, and what it writes, but dx.
struct Backward {
  // x has contiguous rows; dx is null where it is not needed.
  Backward(const Tensor& dy_any, const Tensor& x, const LayerTensors& layer, const Tensor& S_any,
           const Needs& needs, void* dx, const TileSizes& tiles) {
    const Tensor &A_any = layer.lora_A, &B_any = layer.lora_B;
    const Weight weight = weight_of(layer, B_any.size(0), x.size(1), x.scalar_type(), dense);
    const int64_t M = x.size(0), R = A_any.size(0), N = weight.N, K = weight.K;
    check_not_empty(weight);
    check_matrix(x, "x", M, K);
    check_matrix(dy_any, "dy", M, N);
    check_matrix(A_any, "lora_A", R, K);
    check_matrix(B_any, "lora_B", N, R);
    check_matrix(S_any, "S", M, R);
    check_dtype(S_any, "S", ScalarType::Float);
    STD_TORCH_CHECK(dy_any.scalar_type() == x.scalar_type(), "dy must have x's dtype");
    STD_TORCH_CHECK(A_any.scalar_type() == B_any.scalar_type(), "lora_B must have lora_A's dtype");
    dy = with_contiguous_rows(dy_any);
    A = torch::stable::contiguous(A_any);
    B = torch::stable::contiguous(B_any);
    S = torch::stable::contiguous(S_any);
    dA = wanted(x, needs.dA, {R, K}, ScalarType::Float);
    dB = wanted(x, needs.dB, {N, R}, ScalarType::Float);
    dbias = wanted(x, needs.dbias, {N}, ScalarType::Float);

    params.tiles = tiles;
    params.M = M;
    params.R = R;
    params.weight = weight;
    params.x_dtype = dtype_of(x, "x");
    params.adapter_dtype = dtype_of(A, "lora_A");
    params.dy = dy.data_ptr();
    params.lddy = row_stride(dy);
    params.x = x.data_ptr();
    params.ldx = row_stride(x);
    params.lora_A = A.data_ptr();
    params.lora_B = B.data_ptr();
    params.S = static_cast<const float*>(S.data_ptr());
    params.scaling = static_cast<float>(layer.scaling);
    params.dropout = dropout_of(layer.dropout_p, layer.seed);
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
  Tensor dense, dy, A, B, S, dA, dB, dbias;
  LoraLinearBwd params{};
};

// ---- the ops, in the order of their schemas ----------------------------------------------------

std::tuple<Tensor, Tensor> lora_linear_fwd(Tensor x_any, FASTLORA_LAYER) {
  const Tensor x = with_contiguous_rows(x_any);
  Forward layer(x, FASTLORA_LAYER_OF, tile_sizes());
  kernels().lora_linear_fwd({&layer.params, 1}, parallel_for());
  return {layer.y, layer.S};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(Tensor dy, Tensor x_any, FASTLORA_LAYER,
                                                           Tensor S, bool need_dx, bool need_dA,
                                                           bool need_dB, bool need_dbias) {
  const Tensor x = with_contiguous_rows(x_any);
  const Tensor dx = wanted(x, need_dx, {x.size(0), x.size(1)}, std::nullopt);
  Backward layer(dy, x, FASTLORA_LAYER_OF, S, {need_dx, need_dA, need_dB, need_dbias},
                 need_dx ? dx.data_ptr() : nullptr, tile_sizes());
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
    STD_TORCH_CHECK(tensors.size() == count() * kFields && dropouts.size() == count() &&
                        blocksizes.size() == count(),
                    "layers must have ", kFields, " tensors for each scaling");
    const OptionalTensor* t = &tensors[i * kFields];
    STD_TORCH_CHECK(t[0].has_value() && t[7].has_value() && t[8].has_value(),
                    "layers must have a weight, lora_A and lora_B");
    return {*t[0],         t[1], t[2],  t[3],  t[4],        t[5],        blocksizes[i],
            compute_dtype, t[6], *t[7], *t[8], scalings[i], dropouts[i], t[9]};
  }
  // One kernel call decodes or reads the weights of all layers alike.
  void check_alike(const LayerTensors& layer) const {
    const LayerTensors first = (*this)[0];
    STD_TORCH_CHECK(layer.is_dense() == first.is_dense(), "layers must be all dense or all 4-bit");
    STD_TORCH_CHECK(!layer.is_dense() || is_transposed(layer.weight) == is_transposed(first.weight),
                    "layers must all be stored [N, K] or all [K, N]");
  }
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>> shared_linear_fwd(
    Tensor x_any, std::vector<OptionalTensor> tensors, std::vector<int64_t> blocksizes,
    std::optional<ScalarType> compute_dtype, std::vector<double> scalings,
    std::vector<double> dropouts) {
  const Layers layers{std::move(tensors), std::move(blocksizes), compute_dtype, std::move(scalings),
                      std::move(dropouts)};
  STD_TORCH_CHECK(layers.count() > 0, "layers must have one layer at least");
  const Tensor x = with_contiguous_rows(x_any);
  std::vector<Forward> each;
  std::vector<LoraLinearFwd> params;
  const TileSizes tiles = tile_sizes();  // one choice for all
  for (size_t i = 0; i < layers.count(); i++) {
    const LayerTensors layer = layers[i];
    layers.check_alike(layer);
    each.emplace_back(x, layer, tiles);
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
  STD_TORCH_CHECK(layers.count() > 0, "layers must have one layer at least");
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
    const LayerTensors layer = layers[i];
    layers.check_alike(layer);
    each.emplace_back(dys[i], x, layer, Ss[i], asked, need_dx ? dx.data_ptr() : nullptr, tiles);
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
  m.impl("quantize_4bit", TORCH_BOX(&fastlora::quantize_4bit));
  m.impl("dequantize_4bit_out", TORCH_BOX(&fastlora::dequantize_4bit_out));
}
