// Tensors to plain structs. What would corrupt memory is checked here; all else in fastlora/ops/.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/params.h"

namespace fastlora {

// Refuses an argument by a RuntimeError, the one kind that the stable ABI carries.
#define FASTLORA_CHECK(condition, ...)                                             \
  do {                                                                             \
    if (!(condition)) throw std::runtime_error(fastlora::message_of(__VA_ARGS__)); \
  } while (false)

template <class... Args>
std::string message_of(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      throw std::runtime_error(message_of(name, " must be Float, BFloat16 or Half, got ",
                                          torch::headeronly::toString(type)));
  }
}
inline DType dtype_of(const Tensor& t, const char* name) { return dtype_of(t.scalar_type(), name); }

// Where t begins, of which all must be there: sharding and offloading free the storage of tensors that
// live on.
inline void* memory_of(const Tensor& t) {
  int64_t elements = t.numel() > 0, held = 0;
  for (int64_t i = 0; elements > 0 && i < t.dim(); i++) elements += (t.size(i) - 1) * t.stride(i);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  const int64_t needed = (t.storage_offset() + elements) * static_cast<int64_t>(t.element_size());
  FASTLORA_CHECK(elements == 0 || needed <= held, "a tensor of ", t.numel(),
                 " elements has lost its memory: its storage has ", held, " bytes of ", needed);
  return t.data_ptr();
}
// Checked first: torch copies freed memory unasked.
inline Tensor contiguous_copy(const Tensor& t) {
  memory_of(t);
  return torch::stable::contiguous(t);
}
// Asked first: torch's own call takes half a microsecond to find that there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : contiguous_copy(t); }
inline OptionalTensor as_contiguous(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(as_contiguous(*t)) : t;
}

struct MatrixSizes {
  int64_t rows, columns;
};
inline MatrixSizes sizes_of(const Tensor& t, const char* name) {
  FASTLORA_CHECK(t.dim() == 2, name, " must be a matrix, got ", t.dim(), " dimensions");
  return {t.size(0), t.size(1)};
}

// A matrix whose rows are contiguous: t itself, or a contiguous copy if its columns are spread.
inline Tensor with_contiguous_rows(const Tensor& t, const char* name) {
  sizes_of(t, name);
  const bool rows_fit = t.size(0) <= 1 || t.stride(0) >= t.size(1);
  return (t.stride(1) == 1 || t.size(1) <= 1) && rows_fit ? t : contiguous_copy(t);
}
inline int64_t row_stride(const Tensor& t) { return t.size(0) <= 1 ? t.size(1) : t.stride(0); }

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

// A gradient, empty where it is not asked for.
inline Tensor wanted(const Tensor& like, bool needed, std::initializer_list<int64_t> sizes,
                     std::optional<ScalarType> dtype) {
  return needed ? empty(like, sizes, dtype) : empty(like, {0}, dtype);
}

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(memory_of(t));
}

inline std::string shape_of(const Tensor& t) {
  std::string text;
  for (int64_t i = 0; i < t.dim(); i++) text += (i ? ", " : "") + std::to_string(t.size(i));
  return "[" + text + "]";
}
inline void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  FASTLORA_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must be [",
                 rows, ", ", columns, "], got ", shape_of(t));
}
// The kernels divide by sizes; fastlora/backends/native/cpu.py handles empty weights before it calls.
inline void check_not_empty(const Weight& weight) {
  FASTLORA_CHECK(weight.N > 0 && weight.K > 0, "weight must have elements, got [", weight.N, ", ",
                 weight.K, "]");
}
inline void check_vector(const Tensor& t, const char* name, int64_t size) {
  FASTLORA_CHECK(t.numel() == size, name, " must have ", size, " elements, got ", t.numel());
  FASTLORA_CHECK(t.is_contiguous(), name, " must be contiguous");
}
inline void check_dtype(const Tensor& t, const char* name, ScalarType type) {
  FASTLORA_CHECK(t.scalar_type() == type, name, " must be ", torch::headeronly::toString(type),
                 ", got ", torch::headeronly::toString(t.scalar_type()));
}
// Where a contiguous vector of `size` elements of type T begins.
template <class T>
T* vector_of(const Tensor& t, const char* name, int64_t size) {
  check_vector(t, name, size);
  check_dtype(t, name, torch::headeronly::CppTypeToScalarType<T>::value);
  return data_of<T>(t);
}
// N times K, of a weight whose sizes come from its adapter.
inline int64_t elements_of(int64_t N, int64_t K) {
  FASTLORA_CHECK(K == 0 || N <= INT64_MAX / K, "weight can't be [", N, ", ", K, "]");
  return N * K;
}
inline Dropout dropout_of(double p, const OptionalTensor& seed) {
  FASTLORA_CHECK(p >= 0.0 && p <= 1.0, "dropout_p must be between 0 and 1, got ", p);
  // Nearest, ties to even, as Python's round.
  const uint32_t threshold = static_cast<uint32_t>(std::nearbyint(p * 65536));
  Dropout dropout{threshold, 0.0f, nullptr};
  if (threshold < 65536) dropout.scale = static_cast<float>(1.0 / (1.0 - threshold / 65536.0));
  if (p > 0.0) {
    FASTLORA_CHECK(
        seed.has_value() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
        "seed must be an int64 tensor of one element when dropout_p > 0");
    // The seed stays where it is, on the GPU perhaps: the kernel reads it. Low half first.
    dropout.key = data_of<const uint32_t>(*seed);
  }
  return dropout;
}

// The tensors of a 4-bit weight; nested_* are given together or not at all.
struct QuantTensors {
  Tensor packed, absmax, code;
  OptionalTensor nested_absmax, nested_code, nested_offset;
  int64_t blocksize;
};

inline Quant4bit quant_of(const QuantTensors& t, int64_t elements) {
  FASTLORA_CHECK(t.blocksize >= 32 && (t.blocksize & (t.blocksize - 1)) == 0,
                 "blocksize must be a power of two of at least 32, got ", t.blocksize);
  const int64_t blocks = (elements + t.blocksize - 1) / t.blocksize;
  Quant4bit q{};
  q.packed = vector_of<uint8_t>(t.packed, "weight", (elements + 1) / 2);
  q.code = vector_of<float>(t.code, "code", 16);
  q.blocksize = t.blocksize;
  if (!t.nested_absmax.has_value()) {
    q.absmax = vector_of<float>(t.absmax, "absmax", blocks);
    return q;
  }
  FASTLORA_CHECK(t.nested_code.has_value() && t.nested_offset.has_value(),
                 "nested_absmax needs nested_code and nested_offset");
  q.absmax_8bit = vector_of<uint8_t>(t.absmax, "absmax", blocks);
  q.nested_absmax = vector_of<float>(*t.nested_absmax, "nested_absmax",
                                     (blocks + kNestedBlock - 1) / kNestedBlock);
  q.nested_code = vector_of<float>(*t.nested_code, "nested_code", 256);
  q.nested_offset = vector_of<float>(*t.nested_offset, "nested_offset", 1);
  return q;
}

// A dense weight as the kernels can read it: t itself where it is contiguous, or else its transpose.
inline bool is_transposed(const Tensor& t) {
  return !t.is_contiguous() && t.stride(0) == 1 && t.stride(1) == t.size(0);
}
inline Tensor with_order(const Tensor& t) { return is_transposed(t) ? t : as_contiguous(t); }

// `dense` comes from with_order.
inline Weight weight_of(const Tensor& dense) {
  Weight weight{};
  weight.N = dense.size(0);
  weight.K = dense.size(1);
  weight.dense = memory_of(dense);
  weight.transposed = is_transposed(dense);
  weight.compute_dtype = dtype_of(dense, "weight");
  return weight;
}

inline Weight weight_of(const QuantTensors& quant, int64_t N, int64_t K, ScalarType compute_dtype) {
  Weight weight{};
  weight.N = N;
  weight.K = K;
  weight.quant = quant_of(quant, elements_of(N, K));
  weight.compute_dtype = dtype_of(compute_dtype, "compute_dtype");
  return weight;
}

// A layer's fields in the order of {LAYER} in fastlora/backends/schemas.py: parameters of an op, and
// the same as one object.
#define FASTLORA_LAYER                                                                            \
  Tensor weight, OptionalTensor absmax, OptionalTensor code, OptionalTensor nested_absmax,        \
      OptionalTensor nested_code, OptionalTensor nested_offset, int64_t blocksize,                \
      std::optional<ScalarType> compute_dtype, OptionalTensor bias, Tensor lora_A, Tensor lora_B, \
      double scaling, double dropout_p, OptionalTensor seed
#define FASTLORA_LAYER_OF                                                                      \
  LayerTensors {                                                                               \
    weight, absmax, code, nested_absmax, nested_code, nested_offset, blocksize, compute_dtype, \
        bias, lora_A, lora_B, scaling, dropout_p, seed                                         \
  }

struct LayerTensors {
  Tensor weight;
  OptionalTensor absmax, code, nested_absmax, nested_code, nested_offset;
  int64_t blocksize;
  std::optional<ScalarType> compute_dtype;
  OptionalTensor bias;
  Tensor lora_A, lora_B;
  double scaling, dropout_p;
  OptionalTensor seed;

  bool is_dense() const { return !absmax.has_value(); }
  QuantTensors quant() const {
    FASTLORA_CHECK(absmax.has_value() && code.has_value(), "a 4-bit weight needs absmax and code");
    return {weight, *absmax, *code, nested_absmax, nested_code, nested_offset, blocksize};
  }
};

// Sets `dense`, the tensor that the result points into, to a dense weight [N, K].
inline Weight weight_of(const LayerTensors& layer, int64_t N, int64_t K, ScalarType x_dtype,
                        Tensor& dense) {
  if (!layer.is_dense())
    return weight_of(layer.quant(), N, K, layer.compute_dtype.value_or(x_dtype));
  check_matrix(layer.weight, "weight", N, K);
  const ScalarType dtype = layer.compute_dtype.value_or(x_dtype);
  FASTLORA_CHECK(layer.weight.scalar_type() == dtype, "weight must be in x's or compute_dtype");
  FASTLORA_CHECK(dtype == x_dtype || x_dtype == ScalarType::Float,
                 "compute_dtype of a dense weight must be x's dtype unless x is in fp32");
  dense = with_order(layer.weight);
  return weight_of(dense);
}

// How many experts a stack has; none: a plain layer.
using ExpertCount = std::optional<int64_t>;

inline void check_stack(const Tensor& t, const char* name, ExpertCount experts, int64_t rows,
                        int64_t columns) {
  if (!experts) return check_matrix(t, name, rows, columns);
  FASTLORA_CHECK(t.dim() == 3 && t.size(0) == *experts && t.size(1) == rows && t.size(2) == columns,
                 name, " must be [", *experts, ", ", rows, ", ", columns, "], got ", shape_of(t));
}

// lora_A [R, K] and lora_B [N, R], or stacks of them: contiguous, as the kernels read them.
struct Adapter {
  Adapter() = default;
  Adapter(const Tensor& A_any, const Tensor& B_any, ExpertCount experts, int64_t N, int64_t K)
      : A(as_contiguous(A_any)), B(as_contiguous(B_any)) {
    const int64_t R = A.size(experts ? 1 : 0);
    check_stack(A, "lora_A", experts, R, K);
    check_stack(B, "lora_B", experts, N, R);
    FASTLORA_CHECK(A.scalar_type() == B.scalar_type(), "lora_B must have lora_A's dtype");
  }
  template <class Params>
  void fill(Params& params, double scaling) const {
    params.adapter_dtype = dtype_of(A, "lora_A");
    params.lora_A = memory_of(A);
    params.lora_B = memory_of(B);
    params.scaling = static_cast<float>(scaling);
  }
  Tensor A, B;
};

// The arguments and results of quantize_4bit.
struct Quantisation {
  Quantisation(const Tensor& weight_any, const Tensor& bounds, const Tensor& order,
               int64_t blocksize)
      : weight(as_contiguous(weight_any)) {
    const int64_t elements = weight.numel();
    FASTLORA_CHECK(blocksize >= 32 && blocksize % 2 == 0, "blocksize must be even and at least 32");
    packed = empty(weight, {(elements + 1) / 2, 1}, ScalarType::Byte);
    absmax = empty(weight, {(elements + blocksize - 1) / blocksize}, ScalarType::Float);
    params.elements = elements;
    params.blocksize = blocksize;
    params.dtype = dtype_of(weight, "weight");
    params.weight = memory_of(weight);
    params.bounds = vector_of<float>(bounds, "bounds", 15);
    params.order = vector_of<uint8_t>(order, "order", 16);
    params.packed = data_of<uint8_t>(packed);
    params.absmax = data_of<float>(absmax);
  }
  Tensor weight, packed, absmax;
  Quantize4bit params{};
};

inline Dequantize4bit dequantisation_of(const QuantTensors& quant, const Tensor& out) {
  FASTLORA_CHECK(out.is_contiguous(), "out must be contiguous");
  Dequantize4bit p{};
  p.elements = out.numel();
  p.quant = quant_of(quant, p.elements);
  p.dtype = dtype_of(out, "out");
  p.out = memory_of(out);
  return p;
}

}  // namespace fastlora
