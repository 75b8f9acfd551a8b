// Threads for the CPU kernels: torch's own pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "common/params.h"
#include "cpu/linear/experts.h"
#include "cpu/runtime/scratch.h"

namespace fastlora {

// Tiles are handed out a few at a time, in the end one by one, so that a thread that was held up does
// not hold up the others.
inline const ParallelFor& parallel_for() {
  static const ParallelFor parallel = {[](int64_t tiles, int64_t neighbours,
                                          void (*body)(const void*, int64_t, int64_t),
                                          const void* context) {
    const int64_t threads =
        std::min<int64_t>(tiles, static_cast<int64_t>(torch::stable::get_num_threads()));
    if (tiles <= 0) return;
    // One thread needs no pool, which a forked worker of a DataLoader would not have.
    if (threads <= 1) {
      body(context, 0, tiles);
      return trim_scratch(Scratch::local);
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t begin = next; begin < tiles;) {
        const int64_t fair = std::max<int64_t>(1, (tiles - begin) / (2 * threads));
        const int64_t end = begin + std::min(neighbours, fair);
        if (next.compare_exchange_weak(begin, end)) {
          body(context, begin, end);
          begin = next;
        }
      }
      trim_scratch(Scratch::local);
    });
  }};
  return parallel;
}

// All tiles on the calling thread, for a kernel that is itself one tile of a `parallel_for`.
inline const ParallelFor& serial_for() {
  static const ParallelFor serial = {
      [](int64_t tiles, int64_t, void (*body)(const void*, int64_t, int64_t), const void* context) {
        if (tiles <= 0) return;
        body(context, 0, tiles);
        trim_scratch(Scratch::local);
      }};
  return serial;
}

inline Threads threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()), parallel_for(), serial_for()};
}

}  // namespace fastlora
