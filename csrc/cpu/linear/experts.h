// A stack of experts: every expert runs the plain op's kernel on its own rows of x. Nothing is copied,
// and nothing is padded.
//
// For those who call kernels. No kernel includes this: std::vector belongs to no instruction set.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../runtime/kernels.h"

namespace fastlora {

// The rows of one expert.
struct Segment {
  int64_t expert, begin, rows;
};

struct Segments {
  std::vector<Segment> list;  // one for each expert, the longest first
  int64_t end;                // of the last expert's rows
};

// ends[e]: where the rows of expert e end; ascending.
inline Segments segments_of(const int64_t* ends, int64_t experts) {
  Segments segments{{}, 0};
  for (int64_t e = 0; e < experts; e++) {
    segments.list.push_back({e, segments.end, ends[e] - segments.end});
    segments.end = ends[e];
  }
  std::stable_sort(segments.list.begin(), segments.list.end(),
                   [](const Segment& a, const Segment& b) { return a.rows > b.rows; });
  return segments;
}

struct Threads {
  int64_t count;
  const ParallelFor& all;
  const ParallelFor& one;  // only the calling thread: for a kernel inside a tile of `all`
};

// Calls f(segment, parallel) for every segment. A long one gets all threads for itself; the others
// are handed out to the threads, since one with few rows has too few tiles for many of them.
template <class F>
void each_segment(const Segments& segments, const Threads& threads, const F& f) {
  const int64_t count = static_cast<int64_t>(segments.list.size());
  const auto is_long = [&](const Segment& segment, int64_t left) {
    return left < 2 * threads.count || segment.rows * 2 * threads.count > segments.end;
  };
  const Segment* next = segments.list.data();
  int64_t left = count;
  for (; left > 0 && is_long(*next, left); next++, left--) f(*next, threads.all);
  threads.all.each_run(left, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(next[i], threads.one);
  });
}

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// `element` of an array, or null if there is none.
inline const void* at(const void* array, int64_t element, DType dtype) {
  return array ? static_cast<const char*>(array) + element * size_of(dtype) : nullptr;
}
inline void* at(void* array, int64_t element, DType dtype) {
  return const_cast<void*>(at(static_cast<const void*>(array), element, dtype));
}
template <class T>
T* at(T* array, int64_t element) {
  return array ? array + element : nullptr;
}

// The weight of one expert, where `stack` has those of all, [E, N, K]: dense, or 4-bit in whole blocks.
inline Weight expert_of(const Weight& stack, int64_t e) {
  Weight one = stack;
  const int64_t elements = stack.N * stack.K;
  if (stack.dense) {
    one.dense = at(stack.dense, e * elements, stack.compute_dtype);
    return one;
  }
  const int64_t blocks = elements / stack.quant.blocksize;
  one.quant.packed += e * elements / 2;
  one.quant.absmax = at(stack.quant.absmax, e * blocks);
  one.quant.absmax_8bit = at(stack.quant.absmax_8bit, e * blocks);
  one.quant.nested_absmax = at(stack.quant.nested_absmax, e * blocks / kNestedBlock);
  return one;
}

// Zeros in rows [begin, M) of a matrix, if there is one.
inline void clear_rows(void* matrix, int64_t begin, int64_t M, int64_t columns, DType dtype) {
  const int64_t bytes = (M - begin) * columns * size_of(dtype);
  if (matrix && bytes > 0) {
    std::memset(at(matrix, begin * columns, dtype), 0, static_cast<size_t>(bytes));
  }
}

// The layer of one expert, on its rows, where `all` has every expert's arrays, one expert after the
// other, and all M rows; without dy and what is written but S.
template <class Params>
Params expert_of(const Params& all, const Segment& segment) {
  const int64_t N = all.weight.N, K = all.weight.K, e = segment.expert;
  Params p = all;
  p.M = segment.rows;
  p.weight = expert_of(all.weight, e);
  p.x = at(all.x, segment.begin * all.ldx, all.x_dtype);
  p.lora_A = at(all.lora_A, e * all.R * K, all.adapter_dtype);
  p.lora_B = at(all.lora_B, e * N * all.R, all.adapter_dtype);
  p.first_row = segment.begin;
  p.S = at(all.S, segment.begin * all.R);
  return p;
}

// The layers of a stack; there is no bias. Rows past the last expert's become zero.
inline void each_expert_fwd(const Level& level, const LoraLinearFwd& all, const Segments& segments,
                            const Threads& threads) {
  clear_rows(all.y, segments.end, all.M, all.weight.N, all.x_dtype);
  clear_rows(all.S, segments.end, all.M, all.R, DType::f32);
  each_segment(segments, threads, [&](const Segment& segment, const ParallelFor& parallel) {
    LoraLinearFwd p = expert_of(all, segment);
    p.y = at(all.y, segment.begin * all.weight.N, all.x_dtype);
    level.lora_linear_fwd({&p, 1}, parallel);
  });
}

// x is only needed for dA, S only for dB.
inline void each_expert_bwd(const Level& level, const LoraLinearBwd& all, const Segments& segments,
                            const Threads& threads) {
  const int64_t N = all.weight.N, K = all.weight.K, R = all.R;
  clear_rows(all.dx, segments.end, all.M, K, all.x_dtype);
  each_segment(segments, threads, [&](const Segment& segment, const ParallelFor& parallel) {
    LoraLinearBwd p = expert_of(all, segment);
    p.dy = at(all.dy, segment.begin * all.lddy, all.x_dtype);
    p.dx = at(all.dx, segment.begin * K, all.x_dtype);
    p.dA = at(all.dA, segment.expert * R * K);
    p.dB = at(all.dB, segment.expert * N * R);
    level.lora_linear_bwd({&p, 1}, parallel);
  });
}

}  // namespace fastlora
