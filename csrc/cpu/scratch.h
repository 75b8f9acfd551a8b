// Scratch memory of a thread, kept between calls so that no call pays for page faults.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlora {

// What the memory is for: `shared` is read by all threads of a call and belongs to the thread that
// made the call, `local` belongs to the thread that runs a tile.
enum class Scratch { shared, local };

// At least `bytes` bytes aligned to 2 MiB, valid until this thread's next call with the same `kind`.
// Throws std::bad_alloc. The memory is freed when the thread ends.
void* scratch(Scratch kind, size_t bytes);

// Hands out aligned pieces of one scratch block.
struct Pieces {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += bytes<T>(count);
    return piece;
  }
  template <class T>
  static constexpr size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
  }
};

}  // namespace fastlora
