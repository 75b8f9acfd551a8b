// Scratch memory of a thread, kept between calls so that no call pays for page faults.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>

namespace fastlora {

// Who uses the memory: `shared` belongs to the thread that made the call, and all threads of the call
// read it; `local` belongs to the thread that runs a tile.
enum class Scratch { shared, local };

// At least `bytes` bytes aligned to 2 MiB, valid until this thread's next call with the same `kind`.
// Throws std::bad_alloc. The memory is freed when the thread ends.
void* scratch(Scratch kind, size_t bytes);

// Frees the calling thread's block of this kind if a call has left it larger than is worth keeping. No
// piece of it may be in use.
void trim_scratch(Scratch kind);

// Inlined always: what follows belongs to no instruction set, and must not be emitted by any.
#define FASTLORA_ALWAYS_INLINE inline __attribute__((always_inline))

// Hands out aligned pieces of one scratch block, or only counts their bytes.
class Pieces {
  uintptr_t begin_, next_;

 public:
  // Null: only counts. What `take` returns may then not be used.
  explicit FASTLORA_ALWAYS_INLINE Pieces(void* memory)
      : begin_(reinterpret_cast<uintptr_t>(memory)), next_(begin_) {}
  template <class T>
  FASTLORA_ALWAYS_INLINE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    return piece;
  }
  FASTLORA_ALWAYS_INLINE bool only_counts() const { return begin_ == 0; }
  FASTLORA_ALWAYS_INLINE size_t bytes() const { return next_ - begin_; }
};

// What lay_out(pieces) returns, on a block of the size that it asks for: it runs once to count.
template <class LayOut>
FASTLORA_ALWAYS_INLINE auto on_scratch(Scratch kind, const LayOut& lay_out) {
  Pieces counted(nullptr);
  lay_out(counted);
  Pieces pieces(scratch(kind, counted.bytes()));
  return lay_out(pieces);
}

// One of the pieces of a block: so many elements.
template <class T>
struct Piece {
  int64_t count;
};

// Pointers to the pieces of a block: const auto [x, y] = take(kind, Piece<float>{n}, Piece<int>{m}).
template <class... T>
FASTLORA_ALWAYS_INLINE std::tuple<T*...> take(Scratch kind, Piece<T>... asked) {
  return on_scratch(
      kind, [&](Pieces& pieces) { return std::tuple<T*...>{pieces.take<T>(asked.count)...}; });
}

#undef FASTLORA_ALWAYS_INLINE

}  // namespace fastlora
