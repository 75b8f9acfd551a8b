// The instruction sets that were compiled, and the choice among them.
#pragma once

#include <string>

#include "table.h"

namespace fastlora {

// An instruction set. Its kernels are called as members: kernels().dora_norm(p, parallel).
struct Level {
  const char* isa;
  const Kernels* table;
  bool (*runs)();            // on this CPU, if it runs those before
  TileSizes tile_sizes;      // before they are fitted to the caches
  PairProduct pair_product;  // of a matrix unit, or null

#define FASTLORA_KERNEL(name, Params)                             \
  void name(const Params& p, const ParallelFor& parallel) const { \
    table->name(p, {parallel, pair_product});                     \
  }
  FASTLORA_KERNELS(FASTLORA_KERNEL)
#undef FASTLORA_KERNEL
};

// The best set that this CPU runs, or the one that FASTLORA_CPU_ISA names if it is lower.
// Throws std::runtime_error for an unknown name, or for one that this CPU or build lacks.
const Level& kernels();

// The set of this name, or null if it was not compiled.
const Level* level_named(const char* isa);

// The sets that were compiled, from the plainest on, separated by spaces.
std::string compiled_isas();

}  // namespace fastlora
