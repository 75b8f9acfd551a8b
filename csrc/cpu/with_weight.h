// From run-time dtypes to the template that serves them.
#pragma once

#include "scratch.h"
#include "weights.h"

namespace fastlora {
namespace FASTLORA_ISA {

// Calls f(compute, x, source): the kind of product, a null pointer of x's C++ type, and the weight.
//
// bf16 pairs serve a base product in bf16 where the CPU has the instruction, also for fp32 x (rounded
// on the way, as bitsandbytes' compute_dtype asks). All else is fp32 FMA on widened operands.
//   absmax   of a 4-bit weight in fp32, or null: nested statistics are then decoded row by row
template <class F>
static void with_weight(const Weight& weight, DType x_dtype, const float* absmax, const F& f) {
  const Statistics statistics = statistics_of(weight.quant);
  const auto with_source = [&](auto compute, auto* x, auto* dense_type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(dense_type)>>;
    if (weight.dense) {
      f(compute, x, Dense<T>{static_cast<const T*>(weight.dense), weight.K});
    } else {
      const Quant4bit& q = weight.quant;
      f(compute, x,
        FourBit{q.packed, q.code, absmax, weight.K, log2_of(q.blocksize), weight.compute_dtype,
                &statistics});
    }
  };
  with_type(x_dtype, [&](auto* x) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
#if defined(FASTLORA_PAIRS)
    if constexpr (!std::is_same_v<X, f16>) {
      const bool plain = weight.dense && std::is_same_v<X, float>;
      if (weight.compute_dtype == DType::bf16 && !plain) {
        return with_source(Bf16Pair{}, x, static_cast<const bf16*>(nullptr));
      }
    }
#endif
    with_source(F32{}, x, static_cast<const X*>(nullptr));
  });
}

// All of absmax in fp32: the weight's own, or decoded from nested statistics into `memory`.
static inline const float* plain_absmax(const Weight& weight, const ParallelFor& parallel,
                                        float* memory) {
  const Quant4bit& q = weight.quant;
  if (weight.dense || q.absmax) return q.absmax;
  constexpr int64_t kStep = 4096;
  const Statistics statistics = statistics_of(q);
  struct Context {
    const Statistics* statistics;
    int64_t blocks;
    float* out;
  } context{&statistics, ceil_div(weight.N * weight.K, q.blocksize), memory};
  parallel.run(
      ceil_div(context.blocks, kStep), 1,
      [](const void* c, int64_t begin, int64_t end) {
        const auto* context = static_cast<const Context*>(c);
        const int64_t first = begin * kStep, last = min(end * kStep, context->blocks);
        decode_absmax(*context->statistics, first, last, context->out + first);
      },
      &context);
  return memory;
}

static inline size_t absmax_bytes(const Weight& weight) {
  const Quant4bit& q = weight.quant;
  if (weight.dense || q.absmax) return 0;
  return Pieces::bytes<float>(ceil_div(weight.N * weight.K, q.blocksize));
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
