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

// Gives back the calling thread's block of this kind if a call has made it larger than what is worth
// keeping. No piece of it may be in use.
void trim_scratch(Scratch kind);

// Hands out aligned pieces of one scratch block.
struct Pieces {
  char* next;
  // Inlined always: these belong to no instruction set, and must not be emitted by any.
  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += bytes<T>(count);
    return piece;
  }
  template <class T>
  __attribute__((always_inline)) static constexpr size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
  }
};

}  // namespace fastlora
