// Chooses the template for dtypes that are known at run time.
#pragma once

#include "../runtime/scratch.h"
#include "transposed.h"

namespace fastlora::FASTLORA_ISA {

// Calls f.operator()<Compute, X, Source>(): the kind of product, x's C++ type, and what the weight is
// read as, an `Operand`'s source.
//
// A base product in bf16 uses bf16 pairs where the CPU has the instruction, for fp32 x too (rounded on
// the way, as bitsandbytes' compute_dtype asks). All else is fp32 FMA on widened operands; a dense
// weight in 16 bits may stand beside an fp32 x.
template <class F>
static void with_weight(const Weight& weight, DType x_dtype, const F& f) {
  const auto with_source = [&]<class Compute, class X, class T>() {
    if (weight.transposed) {
      f.template operator()<Compute, X, Transposed<T>>();
    } else if (weight.dense) {
      f.template operator()<Compute, X, Dense<T>>();
    } else {
      f.template operator()<Compute, X, FourBit>();
    }
  };
  with_type(x_dtype, [&]<class X>() {
#if defined(FASTLORA_PAIRS)
    if constexpr (!std::is_same_v<X, f16>) {
      if (weight.compute_dtype == DType::bf16) {
        return with_source.template operator()<Bf16Pair, X, bf16>();
      }
    }
#endif
    if constexpr (std::is_same_v<X, float>) {
      if (weight.dense) {
        return with_type(weight.compute_dtype,
                         [&]<class T>() { with_source.template operator()<F32, X, T>(); });
      }
    }
    with_source.template operator()<F32, X, X>();
  });
}

static inline bool is_nested(const Weight& weight) {
  return weight.dense == nullptr && weight.quant.absmax == nullptr;
}
static inline int64_t blocks_of(const Weight& weight) {
  return ceil_div(weight.N * weight.K, weight.quant.blocksize);
}

// All of absmax in fp32: the weight's own, or decoded from nested statistics into `memory`.
static inline const float* plain_absmax(const Weight& weight, const ParallelFor& parallel,
                                        float* memory) {
  const Quant4bit& q = weight.quant;
  if (!is_nested(weight)) return q.absmax;
  constexpr int64_t kStep = 4096;
  const Statistics statistics = statistics_of(q);
  const int64_t blocks = blocks_of(weight);
  parallel.each_run(ceil_div(blocks, kStep), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kStep;
    decode_absmax(statistics, first, min(end * kStep, blocks), memory + first);
  });
  return memory;
}

}  // namespace fastlora::FASTLORA_ISA
