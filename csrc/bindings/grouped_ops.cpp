// torch.ops.fastlora.grouped_*: the layers of a stack of experts, each on its own rows of x.
//
// Formulas, shapes and dtypes: fastlora/reference/. Every expert runs the kernel of the plain op on
// its part of each array: nothing is copied, and nothing is padded.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/runtime/kernels.h"
#include "cpu/runtime/tile_sizes.h"
#include "parallel.h"

namespace fastlora {
namespace {

// The stack [E, N, K], dense or 4-bit.
struct Experts {
  int64_t E;
  Weight all;  // of which `quant` and `dense` belong to expert 0

  Weight operator[](int64_t e) const {
    Weight one = all;
    const int64_t elements = all.N * all.K, blocks = elements / quant_blocksize();
    if (all.dense) {
      one.dense = static_cast<const char*>(all.dense) + e * elements * size_of(all.compute_dtype);
      return one;
    }
    one.quant.packed += e * elements / 2;
    if (all.quant.absmax) one.quant.absmax += e * blocks;
    if (all.quant.absmax_8bit) {
      one.quant.absmax_8bit += e * blocks;
      one.quant.nested_absmax += e * blocks / kNestedBlock;
    }
    return one;
  }

  static int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

 private:
  int64_t quant_blocksize() const { return all.dense ? 1 : all.quant.blocksize; }
};

void check_stack(const Tensor& t, const char* name, int64_t E, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == E && t.size(1) == rows && t.size(2) == columns, name,
                  " must be [", E, ", ", rows, ", ", columns, "]");
}

// Sets `dense`, the tensor that the result points into, to a dense stack [E, N, K].
Experts experts_of(const LayerTensors& layer, const Tensor& x, Tensor& dense) {
  const Tensor &A = layer.lora_A, &B = layer.lora_B;
  STD_TORCH_CHECK(A.dim() == 3 && B.dim() == 3, "lora_A and lora_B must be stacks");
  const int64_t E = B.size(0), N = B.size(1), K = A.size(2);
  Weight all{};
  all.N = N;
  all.K = K;
  check_not_empty(all);
  if (layer.is_dense()) {
    check_stack(layer.weight, "weight", E, N, K);
    STD_TORCH_CHECK(layer.weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
    dense = torch::stable::contiguous(layer.weight);
    all.dense = dense.data_ptr();
    all.compute_dtype = dtype_of(dense, "weight");
    return {E, all};
  }
  all.quant = quant_of(layer.quant(), E * N * K);
  all.compute_dtype = dtype_of(layer.compute_dtype.value_or(x.scalar_type()), "compute_dtype");
  const int64_t together = layer.blocksize * (layer.nested_absmax.has_value() ? kNestedBlock : 1);
  STD_TORCH_CHECK(N * K % together == 0, "each expert must have whole blocks of ", together,
                  " elements, got ", N, " x ", K);
  return {E, all};
}

struct Segment {
  int64_t expert, begin, rows;
};

struct Segments {
  std::vector<Segment> list;  // one for each expert, the longest first
  int64_t end;                // of the last one
};

Segments segments_of(const Tensor& offsets, int64_t E, int64_t M) {
  check_vector(offsets, "offsets", E);
  check_dtype(offsets, "offsets", ScalarType::Long);
  const int64_t* ends = static_cast<const int64_t*>(offsets.data_ptr());
  Segments segments{{}, 0};
  for (int64_t e = 0; e < E; e++) {
    STD_TORCH_CHECK(segments.end <= ends[e] && ends[e] <= M,
                    "offsets must ascend from 0 to at most ", M, ", got ", ends[e], " after ",
                    segments.end);
    segments.list.push_back({e, segments.end, ends[e] - segments.end});
    segments.end = ends[e];
  }
  std::stable_sort(segments.list.begin(), segments.list.end(),
                   [](const Segment& a, const Segment& b) { return a.rows > b.rows; });
  return segments;
}

// Calls f(segment, parallel) for every segment. A long one gets all threads for itself; the others
// are handed out to the threads, since one with few rows has too few tiles for many of them.
template <class F>
void each_segment(const Segments& segments, const F& f) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t count = static_cast<int64_t>(segments.list.size());
  int64_t next = 0;
  const auto is_long = [&](int64_t i) {
    const bool last_ones = count - i < 2 * threads;
    return last_ones || segments.list[i].rows * 2 * threads > segments.end;
  };
  while (next < count && is_long(next)) f(segments.list[next++], parallel_for());
  struct Context {
    const Segment* list;
    const F* f;
  } context{segments.list.data() + next, &f};
  parallel_for().run(
      count - next, 1,
      [](const void* c, int64_t begin, int64_t end) {
        const auto* context = static_cast<const Context*>(c);
        for (int64_t i = begin; i < end; i++) (*context->f)(context->list[i], serial_for());
      },
      &context);
}

const char* at(const Tensor& t, int64_t element) {
  return static_cast<const char*>(t.data_ptr()) + element * t.element_size();
}
char* at(Tensor& t, int64_t element) {
  return static_cast<char*>(t.data_ptr()) + element * t.element_size();
}
float* floats_at(Tensor& t, int64_t element) { return static_cast<float*>(t.data_ptr()) + element; }

// Zeros in the rows of a matrix from `row` on.
void clear_from(Tensor& t, int64_t row) {
  const int64_t columns = t.size(1);
  std::memset(at(t, row * columns), 0,
              static_cast<size_t>((t.size(0) - row) * columns * t.element_size()));
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_any, const LayerTensors& layer,
                                   const Tensor& offsets) {
  const Tensor &A_any = layer.lora_A, &B_any = layer.lora_B;
  Tensor dense;
  const Experts experts = experts_of(layer, x_any, dense);
  const int64_t M = x_any.size(0), R = A_any.size(1), N = experts.all.N, K = experts.all.K;
  check_matrix(x_any, "x", M, K);
  check_stack(A_any, "lora_A", experts.E, R, K);
  check_stack(B_any, "lora_B", experts.E, N, R);
  STD_TORCH_CHECK(A_any.scalar_type() == B_any.scalar_type(), "lora_B must have lora_A's dtype");
  const Segments segments = segments_of(offsets, experts.E, M);
  const Tensor x = with_contiguous_rows(x_any);
  const Tensor A = torch::stable::contiguous(A_any), B = torch::stable::contiguous(B_any);
  Tensor y = empty(x, {M, N});
  Tensor S = empty(x, {M, R}, ScalarType::Float);
  clear_from(y, segments.end);
  clear_from(S, segments.end);

  LoraLinearFwd all{};
  all.tiles = tile_sizes();
  all.R = R;
  all.x_dtype = dtype_of(x, "x");
  all.adapter_dtype = dtype_of(A, "lora_A");
  all.ldx = row_stride(x);
  all.scaling = static_cast<float>(layer.scaling);
  all.dropout = dropout_of(layer.dropout_p, layer.seed);
  each_segment(segments, [&](const Segment& segment, const ParallelFor& parallel) {
    LoraLinearFwd p = all;
    p.M = segment.rows;
    p.weight = experts[segment.expert];
    p.x = at(x, segment.begin * all.ldx);
    p.lora_A = at(A, segment.expert * R * K);
    p.lora_B = at(B, segment.expert * N * R);
    p.first_row = segment.begin;
    p.y = at(y, segment.begin * N);
    p.S = floats_at(S, segment.begin * R);
    kernels().lora_linear_fwd({&p, 1}, parallel);
  });
  return {y, S};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy_any, const OptionalTensor& x_any, const LayerTensors& layer,
    const Tensor& offsets, const OptionalTensor& S_any, bool need_dx, bool need_dA, bool need_dB) {
  const Tensor &A_any = layer.lora_A, &B_any = layer.lora_B;
  Tensor dense;
  const Experts experts = experts_of(layer, dy_any, dense);
  const int64_t M = dy_any.size(0), R = A_any.size(1), N = experts.all.N, K = experts.all.K;
  const int64_t E = experts.E;
  check_matrix(dy_any, "dy", M, N);
  check_stack(A_any, "lora_A", E, R, K);
  check_stack(B_any, "lora_B", E, N, R);
  STD_TORCH_CHECK(A_any.scalar_type() == B_any.scalar_type(), "lora_B must have lora_A's dtype");
  STD_TORCH_CHECK(x_any.has_value() || !need_dA, "x must be given where dA is needed");
  STD_TORCH_CHECK(S_any.has_value() || !need_dB, "S must be given where dB is needed");
  const Segments segments = segments_of(offsets, E, M);
  const Tensor dy = with_contiguous_rows(dy_any);
  OptionalTensor x, S;
  if (x_any.has_value()) {
    check_matrix(*x_any, "x", M, K);
    STD_TORCH_CHECK(dy.scalar_type() == x_any->scalar_type(), "dy must have x's dtype");
    x = with_contiguous_rows(*x_any);
  }
  if (S_any.has_value()) {
    check_matrix(*S_any, "S", M, R);
    check_dtype(*S_any, "S", ScalarType::Float);
    S = torch::stable::contiguous(*S_any);
  }
  const Tensor A = torch::stable::contiguous(A_any), B = torch::stable::contiguous(B_any);
  Tensor dx = wanted(dy, need_dx, {M, K}, std::nullopt);
  Tensor dA = wanted(dy, need_dA, {E, R, K}, ScalarType::Float);
  Tensor dB = wanted(dy, need_dB, {E, N, R}, ScalarType::Float);
  if (need_dx) clear_from(dx, segments.end);

  LoraLinearBwd all{};
  all.tiles = tile_sizes();
  all.R = R;
  all.x_dtype = dtype_of(dy, "dy");
  all.adapter_dtype = dtype_of(A, "lora_A");
  all.lddy = row_stride(dy);
  all.ldx = x.has_value() ? row_stride(*x) : K;
  all.scaling = static_cast<float>(layer.scaling);
  all.dropout = dropout_of(layer.dropout_p, layer.seed);
  each_segment(segments, [&](const Segment& segment, const ParallelFor& parallel) {
    LoraLinearBwd p = all;
    p.M = segment.rows;
    p.weight = experts[segment.expert];
    p.dy = at(dy, segment.begin * all.lddy);
    p.x = x.has_value() ? at(*x, segment.begin * all.ldx) : nullptr;
    p.lora_A = at(A, segment.expert * R * K);
    p.lora_B = at(B, segment.expert * N * R);
    p.S = S.has_value() ? static_cast<const float*>(S->data_ptr()) + segment.begin * R : nullptr;
    p.first_row = segment.begin;
    p.dx = need_dx ? at(dx, segment.begin * K) : nullptr;
    p.dA = need_dA ? floats_at(dA, segment.expert * R * K) : nullptr;
    p.dB = need_dB ? floats_at(dB, segment.expert * N * R) : nullptr;
    kernels().lora_linear_bwd({&p, 1}, parallel);
  });
  if (need_dA) dA = torch::stable::to(dA, A.scalar_type());
  if (need_dB) dB = torch::stable::to(dB, B.scalar_type());
  return {dx, dA, dB, empty(dy, {0}, ScalarType::Float)};
}

// ---- the ops, in the order of their schemas ----------------------------------------------------

std::tuple<Tensor, Tensor> grouped_lora_linear_fwd(Tensor x, FASTLORA_LAYER, Tensor offsets) {
  STD_TORCH_CHECK(!bias.has_value(), "experts have no bias");
  return forward(x, FASTLORA_LAYER_OF, offsets);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grouped_lora_linear_bwd(Tensor dy, OptionalTensor x,
                                                                   FASTLORA_LAYER, Tensor offsets,
                                                                   OptionalTensor S, bool need_dx,
                                                                   bool need_dA, bool need_dB,
                                                                   bool need_dbias) {
  STD_TORCH_CHECK(!need_dbias, "experts have no bias");
  return backward(dy, x, FASTLORA_LAYER_OF, offsets, S, need_dx, need_dA, need_dB);
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("grouped_lora_linear_fwd", TORCH_BOX(&fastlora::grouped_lora_linear_fwd));
  m.impl("grouped_lora_linear_bwd", TORCH_BOX(&fastlora::grouped_lora_linear_bwd));
}
