// torch.ops.fastlora.*: CUDA implementations, on torch's stable ABI. They are in a library of their own,
// which fastlora/backends/native/library.py loads; native/cuda.py composes the layers' ops from them.
//
// All work is enqueued on torch's current stream; scratch memory comes from torch's allocator.
#include <tuple>

#include "bindings/cuda_stream.h"
#include "checks.h"
#include "cuda/kernels.h"

// Under another name and for another device where the kernels are emulated.
#ifndef FASTLORA_CUDA_LIBRARY
#define FASTLORA_CUDA_LIBRARY fastlora
#define FASTLORA_CUDA_DEVICE CUDA
#endif

namespace fastlora {
namespace {

void check_launch(const char* op, const char* error) {
  FASTLORA_CHECK(error == nullptr, op, ": CUDA says: ", error);
}

bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(memory_of(t)) % cuda::kRowAlignment == 0;
}

// The kernels copy rows in pieces of 16 bytes: t itself, or a copy whose rows start at multiples of
// that. So must those past the end, which are not read: a single row needs such a stride, too.
Tensor with_aligned_rows(const Tensor& t) {
  FASTLORA_CHECK(t.dim() == 2, "x and dy must be matrices");
  const int64_t M = t.size(0), K = t.size(1);
  const int64_t unit = cuda::kRowAlignment / static_cast<int64_t>(t.element_size());
  const bool rows_fit = t.stride(0) >= K && t.stride(0) % unit == 0;
  if (rows_fit && (K <= 1 || t.stride(1) == 1) && is_aligned(t)) return t;
  Tensor wide = empty(t, {M, (K + unit - 1) / unit * unit});
  Tensor copy = torch::stable::narrow(wide, 1, 0, K);
  memory_of(t);
  torch::stable::copy_(copy, t);
  return copy;
}

void check_on_device(const Tensor& x, const Tensor& t, const char* name) {
  FASTLORA_CHECK(t.get_device_index() == x.get_device_index(), name, " must be on x's device");
}

void check_on_device(const Tensor& x, const OptionalTensor& t, const char* name) {
  if (t.has_value()) check_on_device(x, *t, name);
}

void check_on_device(const Tensor& x, const QuantTensors& quant) {
  check_on_device(x, quant.packed, "weight");
  check_on_device(x, quant.absmax, "absmax");
  check_on_device(x, quant.code, "code");
  check_on_device(x, quant.nested_absmax, "nested_absmax");
  check_on_device(x, quant.nested_code, "nested_code");
  check_on_device(x, quant.nested_offset, "nested_offset");
}

// The kernels copy packed codes, too, in pieces of 16 bytes.
QuantTensors with_aligned_codes(QuantTensors quant) {
  if (!is_aligned(quant.packed)) {
    Tensor copy = empty(quant.packed, {quant.packed.numel()});
    memory_of(quant.packed);
    torch::stable::copy_(copy, quant.packed);
    quant.packed = copy;
  }
  return quant;
}

Weight weight_of(const QuantTensors& quant, int64_t N, int64_t K, const Tensor& x) {
  // Sizes and steps are counted with 32 bits.
  FASTLORA_CHECK(N < (int64_t{1} << 31) && K < (int64_t{1} << 31),
                 "weight must have fewer than 2^31 rows and columns, got [", N, ", ", K, "]");
  check_on_device(x, quant);
  Weight weight{};
  weight.N = N;
  weight.K = K;
  weight.quant = quant_of(quant, N * K);
  weight.compute_dtype = dtype_of(x, "x");
  FASTLORA_CHECK(weight.compute_dtype != DType::f32, "x must be bf16 or fp16");
  check_not_empty(weight);
  return weight;
}

Tensor scratch(const Tensor& like, int64_t floats) {
  return empty(like, {floats}, ScalarType::Float);
}

// ---- the ops, in the order of their schemas ----------------------------------------------------

std::tuple<Tensor, Tensor> quantize_4bit(Tensor weight, Tensor bounds, Tensor order,
                                         int64_t blocksize) {
  const OnDeviceOf device(weight);
  check_on_device(weight, bounds, "bounds");
  check_on_device(weight, order, "order");
  FASTLORA_CHECK((blocksize & (blocksize - 1)) == 0 && blocksize <= cuda::kMostBlocksize,
                 "blocksize must be a power of two of at most ", cuda::kMostBlocksize, ", got ",
                 blocksize);
  const Quantisation q(weight, bounds, order, blocksize);
  check_launch("quantize_4bit", cuda::quantize_4bit(q.params, device.stream()));
  return {q.packed, q.absmax};
}

std::tuple<Tensor, Tensor> quantize_absmax(Tensor absmax, Tensor offset, Tensor code) {
  const OnDeviceOf device(absmax);
  const int64_t blocks = absmax.numel();
  check_on_device(absmax, offset, "offset");
  check_on_device(absmax, code, "code");
  cuda::QuantizeAbsmax p{};
  p.blocks = blocks;
  p.absmax = vector_of<float>(absmax, "absmax", blocks);
  p.offset = vector_of<float>(offset, "offset", 1);
  p.code = vector_of<float>(code, "code", 256);
  const Tensor codes = empty(absmax, {blocks}, ScalarType::Byte);
  const Tensor nested_absmax = empty(absmax, {(blocks + kNestedBlock - 1) / kNestedBlock});
  p.absmax_8bit = data_of<uint8_t>(codes);
  p.nested_absmax = data_of<float>(nested_absmax);
  check_launch("quantize_absmax", cuda::quantize_absmax(p, device.stream()));
  return {codes, nested_absmax};
}

void dequantize_4bit_out(Tensor weight, Tensor absmax, Tensor code, OptionalTensor nested_absmax,
                         OptionalTensor nested_code, OptionalTensor nested_offset,
                         int64_t blocksize, Tensor out) {
  const OnDeviceOf device(out);
  const QuantTensors quant{weight,      absmax,        code,     nested_absmax,
                           nested_code, nested_offset, blocksize};
  check_on_device(out, quant);
  check_launch("dequantize_4bit",
               cuda::dequantize_4bit(dequantisation_of(quant, out), device.stream()));
}

// What qlora_gemm_fwd and qlora_gemm_dx have in common.
cuda::QloraGemm gemm_of(const Tensor& x, const Weight& weight, const Tensor& S,
                        const Tensor& adapter, const Tensor& y) {
  check_matrix(S, "S", x.size(0), S.size(1));
  check_dtype(S, "S", ScalarType::Float);
  FASTLORA_CHECK(S.is_contiguous() && adapter.is_contiguous(),
                 "S and the adapter must be contiguous");
  check_on_device(x, S, "S");
  check_on_device(x, adapter, "the adapter");
  cuda::QloraGemm p{};
  p.M = x.size(0);
  p.R = S.size(1);
  p.weight = weight;
  p.x = memory_of(x);
  p.ldx = x.stride(0);
  p.S = data_of<float>(S);
  p.factor = 1.0f;
  p.adapter_dtype = dtype_of(adapter, "the adapter");
  p.adapter = memory_of(adapter);
  p.y_dtype = dtype_of(y, "y");
  p.y = memory_of(y);
  return p;
}

Tensor qlora_gemm_fwd(Tensor x_any, Tensor weight, Tensor absmax, Tensor code,
                      OptionalTensor nested_absmax, OptionalTensor nested_code,
                      OptionalTensor nested_offset, int64_t blocksize, OptionalTensor bias_any,
                      Tensor S, Tensor lora_B, double scaling, ScalarType dtype) {
  const OnDeviceOf device(x_any);
  const Tensor x = with_aligned_rows(x_any);
  const OptionalTensor bias = as_contiguous(bias_any);
  const QuantTensors quant = with_aligned_codes(
      {weight, absmax, code, nested_absmax, nested_code, nested_offset, blocksize});
  const int64_t M = x.size(0), K = x.size(1), N = lora_B.size(0);
  check_matrix(lora_B, "lora_B", N, S.size(1));
  const Tensor y = empty(x, {M, N}, dtype);
  cuda::QloraGemm p = gemm_of(x, weight_of(quant, N, K, x), S, lora_B, y);
  p.factor = static_cast<float>(scaling);
  if (bias.has_value()) {
    check_vector(*bias, "bias", N);
    check_on_device(x, *bias, "bias");
    p.bias_dtype = dtype_of(*bias, "bias");
    p.bias = memory_of(*bias);
  }
  const Tensor workspace = scratch(x, cuda::qlora_gemm_fwd_workspace(M, N, K));
  check_launch("qlora_gemm_fwd",
               cuda::qlora_gemm_fwd(p, data_of<float>(workspace), device.stream()));
  return y;
}

Tensor qlora_gemm_dx(Tensor dy_any, Tensor weight, Tensor absmax, Tensor code,
                     OptionalTensor nested_absmax, OptionalTensor nested_code,
                     OptionalTensor nested_offset, int64_t blocksize, Tensor dS, Tensor lora_A,
                     double dropout_p, OptionalTensor seed, ScalarType dtype) {
  const OnDeviceOf device(dy_any);
  const Tensor dy = with_aligned_rows(dy_any);
  const QuantTensors quant = with_aligned_codes(
      {weight, absmax, code, nested_absmax, nested_code, nested_offset, blocksize});
  check_on_device(dy, seed, "seed");
  const int64_t M = dy.size(0), N = dy.size(1), K = lora_A.size(1);
  check_matrix(lora_A, "lora_A", dS.size(1), K);
  const Tensor dx = empty(dy, {M, K}, dtype);
  cuda::QloraGemm p = gemm_of(dy, weight_of(quant, N, K, dy), dS, lora_A, dx);
  p.dropout = dropout_of(dropout_p, seed);
  const Tensor workspace = scratch(dy, cuda::qlora_gemm_dx_workspace(M, N, K));
  check_launch("qlora_gemm_dx", cuda::qlora_gemm_dx(p, data_of<float>(workspace), device.stream()));
  return dx;
}

std::tuple<Tensor, Tensor> qlora_decode(Tensor x_any, FASTLORA_LAYER) {
  const OnDeviceOf device(x_any);
  const Tensor x = with_aligned_rows(x_any);
  const OptionalTensor flat_bias = as_contiguous(bias);
  const QuantTensors quant = with_aligned_codes((FASTLORA_LAYER_OF).quant());
  check_on_device(x, seed, "seed");
  const int64_t M = x.size(0), K = x.size(1), N = lora_B.size(0), R = lora_A.size(0);
  FASTLORA_CHECK(M <= cuda::kDecodeTokens, "x must have at most ", cuda::kDecodeTokens, " rows");
  FASTLORA_CHECK(K % 64 == 0 && blocksize % 64 == 0, "K and blocksize must be multiples of 64");
  // The kernel counts W in groups of 64 codes with 32 bits.
  FASTLORA_CHECK(N < (int64_t{1} << 31) && K < (int64_t{1} << 31) && N * (K / 64) >> 32 == 0,
                 "weight must have fewer than 2^38 elements, got [", N, ", ", K, "]");
  check_matrix(lora_A, "lora_A", R, K);
  check_matrix(lora_B, "lora_B", N, R);
  check_dtype(lora_B, "lora_B", lora_A.scalar_type());
  FASTLORA_CHECK(lora_A.is_contiguous() && lora_B.is_contiguous(),
                 "lora_A and lora_B must be contiguous");
  check_on_device(x, lora_A, "lora_A");
  check_on_device(x, lora_B, "lora_B");
  const Tensor y = empty(x, {M, N}), S = empty(x, {M, R}, ScalarType::Float);
  LoraLinearFwd p{};
  p.M = M;
  p.R = R;
  p.weight = weight_of(quant, N, K, x);
  p.x_dtype = p.weight.compute_dtype;
  p.adapter_dtype = dtype_of(lora_A, "lora_A");
  p.x = memory_of(x);
  p.ldx = x.stride(0);
  if (flat_bias.has_value()) {
    check_vector(*flat_bias, "bias", N);
    check_on_device(x, *flat_bias, "bias");
    p.bias_dtype = dtype_of(*flat_bias, "bias");
    p.bias = memory_of(*flat_bias);
  }
  p.lora_A = memory_of(lora_A);
  p.lora_B = memory_of(lora_B);
  p.scaling = static_cast<float>(scaling);
  p.dropout = dropout_of(dropout_p, seed);
  p.y = memory_of(y);
  p.S = data_of<float>(S);
  const Tensor workspace = scratch(x, cuda::qlora_decode_workspace(p));
  check_launch("qlora_decode", cuda::qlora_decode(p, data_of<float>(workspace), device.stream()));
  return {y, S};
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(FASTLORA_CUDA_LIBRARY, FASTLORA_CUDA_DEVICE, m) {
  m.impl("quantize_4bit", TORCH_BOX(&fastlora::quantize_4bit));
  m.impl("quantize_absmax", TORCH_BOX(&fastlora::quantize_absmax));
  m.impl("dequantize_4bit_out", TORCH_BOX(&fastlora::dequantize_4bit_out));
  m.impl("qlora_gemm_fwd", TORCH_BOX(&fastlora::qlora_gemm_fwd));
  m.impl("qlora_gemm_dx", TORCH_BOX(&fastlora::qlora_gemm_dx));
  m.impl("qlora_decode", TORCH_BOX(&fastlora::qlora_decode));
}
