#include "scratch.h"

#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastlora {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kWorthKeeping = size_t{32} << 20;

struct Block {
  void* data = nullptr;
  size_t size = 0;
  ~Block() { std::free(data); }
};

Block& block_of(Scratch kind) {
  thread_local Block blocks[2];
  return blocks[static_cast<int>(kind)];
}

}  // namespace

void* scratch(Scratch kind, size_t bytes) {
  Block& block = block_of(kind);
  if (bytes > block.size) {
    std::free(block.data);
    block.size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    block.data = std::aligned_alloc(kHugePage, block.size);
    if (block.data == nullptr) {
      block.size = 0;
      throw std::bad_alloc();
    }
#ifdef MADV_HUGEPAGE
    madvise(block.data, block.size, MADV_HUGEPAGE);
#endif
  }
  return block.data;
}

void trim_scratch(Scratch kind) {
  Block& block = block_of(kind);
  if (block.size <= kWorthKeeping) return;
  std::free(block.data);
  block.data = nullptr;
  block.size = 0;
}

}  // namespace fastlora
