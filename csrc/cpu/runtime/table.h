// The kernels that are compiled for each instruction set.
#pragma once

#include "../../common/params.h"
#include "../isa/product.h"

namespace fastlora {

// One layer, or `count` that read one x: with the same M, K, x, tiles and dtypes, all dense or all
// 4-bit. The layers of a backward have one dx, the sum of what each adds to it.
template <class Params>
struct LayersOf {
  const Params* data;
  int64_t count;
};

// What a kernel runs on.
struct Machine {
  const ParallelFor& parallel;
  PairProduct pair_product;  // for base products of bf16 pairs, or null
};

struct Kernels {
#define FASTLORA_KERNEL(name, Params) void (*name)(const Params&, const Machine&);
#include "kernels.def"
};

#if defined(FASTLORA_ISA)
namespace FASTLORA_ISA {
#define FASTLORA_KERNEL(name, Params) void name(const Params& p, const Machine& machine);
#include "kernels.def"
}  // namespace FASTLORA_ISA
#endif

}  // namespace fastlora
