// The kernels that are compiled for each instruction set.
#pragma once

#include "../../common/params.h"
#include "../isa/product.h"

namespace fastlora {

// What a kernel runs on.
struct Machine {
  const ParallelFor& parallel;
  PairProduct pair_product;  // for base products of bf16 pairs, or null
};

struct Kernels {
#define FASTLORA_KERNEL(name, Params) void (*name)(const Params&, const Machine&);
  FASTLORA_KERNELS(FASTLORA_KERNEL)
#undef FASTLORA_KERNEL
};

#if defined(FASTLORA_ISA)
namespace FASTLORA_ISA {
#define FASTLORA_KERNEL(name, Params) void name(const Params& p, const Machine& machine);
FASTLORA_KERNELS(FASTLORA_KERNEL)
#undef FASTLORA_KERNEL
}  // namespace FASTLORA_ISA
#endif

}  // namespace fastlora
