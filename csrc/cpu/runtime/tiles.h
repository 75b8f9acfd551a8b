// Runs a stage of a kernel, a member function, over its tiles.
#pragma once

#include "../isa/simd.h"

namespace fastlora::FASTLORA_ISA {

template <class Kernel>
FASTLORA_INLINE void for_each_tile(const ParallelFor& parallel, Kernel* kernel,
                                   void (Kernel::*stage)(int64_t tile), int64_t tiles,
                                   int64_t neighbours = 1) {
  parallel.each_run(tiles, neighbours, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) (kernel->*stage)(i);
  });
}

}  // namespace fastlora::FASTLORA_ISA
