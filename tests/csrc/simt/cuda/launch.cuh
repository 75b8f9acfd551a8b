// csrc/cuda/launch.cuh for a CPU: the kernel has run when launch() returns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../simt.h"
#include "cuda/kernels.h"

namespace fastlora::cuda {

template <class Params>
const char* launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, Stream,
                   const Params& params) {
  simt::launch(blocks, threads, shared_bytes, [&] { kernel(params); });
  return nullptr;
}

inline const char* use(int) { return nullptr; }
template <class Params>
const char* fault_on(int, void (*)(Params)) {
  return nullptr;
}

inline int blocks_at_once(size_t shared_bytes, int most) {
  const size_t all = simt::architecture().of_multiprocessor * simt::kKiB;
  const int fit = static_cast<int>(all / (shared_bytes + simt::kReserved));
  return fit < 1 ? 1 : fit < most ? fit : most;
}

// Few, so that small layers are split too.
inline int multiprocessors() { return 6; }

}  // namespace fastlora::cuda
