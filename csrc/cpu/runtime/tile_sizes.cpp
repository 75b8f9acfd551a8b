#include "tile_sizes.h"

#include <atomic>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastlora {
namespace {

// The sizes in kLevels were chosen on a Zen 4 with these caches. Those for other sets and caches follow
// from them by the rule in `fit`; they have not been measured.
constexpr CacheSizes kReference{1 << 20, 32 << 20};

// Scales `size` from `reference` to `cache` bytes of cache: in proportion, by powers of two, to at
// least a quarter and at most twice as much.
int64_t fit(int64_t size, int64_t reference, int64_t cache) {
  if (cache <= 0) return size;
  if (cache >= 2 * reference) return 2 * size;
  int64_t fitted = size;
  for (; cache < reference && fitted > size / 4; reference /= 2) fitted /= 2;
  return fitted;
}

// "32K", "1024K", "2M" to bytes.
int64_t bytes_of(const std::string& text) {
  try {
    size_t digits = 0;
    const int64_t number = std::stoll(text, &digits);
    if (digits == text.size()) return number;
    return number << (text[digits] == 'K' ? 10 : text[digits] == 'M' ? 20 : 30);
  } catch (const std::logic_error&) {
    return 0;
  }
}

// The sizes in use. Each is atomic and valid whatever the others are, so that no lock is needed: one
// that is held while the process forks would never be free in the child.
struct InUse {
  std::atomic<int64_t> values[std::size(kTileSizeFields)];

  InUse() { set(default_tile_sizes(kernels().isa, cache_sizes())); }
  void set(const TileSizes& sizes) {
    for (size_t i = 0; i < std::size(values); i++) values[i] = sizes.*kTileSizeFields[i].value;
  }
  TileSizes get() const {
    TileSizes sizes;
    for (size_t i = 0; i < std::size(values); i++) sizes.*kTileSizeFields[i].value = values[i];
    return sizes;
  }
};

InUse& in_use() {
  static InUse sizes;
  return sizes;
}

}  // namespace

CacheSizes cache_sizes() {
  // Not sysconf: on AMD its third level is that of the whole socket.
  CacheSizes sizes{0, 0};
  for (int index = 0;; index++) {
    const std::string folder =
        "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    std::string level, size;
    if (!(std::ifstream(folder + "level") >> level)) return sizes;
    if (!(std::ifstream(folder + "size") >> size)) continue;
    if (level == "2") sizes.l2 = bytes_of(size);
    if (level == "3") sizes.l3 = bytes_of(size);
  }
}

TileSizes default_tile_sizes(const char* isa, CacheSizes caches) {
  const Level* level = level_named(isa);
  if (level == nullptr) {
    throw std::invalid_argument(std::string("no tile sizes for instruction set ") + isa);
  }
  TileSizes sizes = level->tile_sizes;
  sizes.fwd_pack_bytes = fit(sizes.fwd_pack_bytes, kReference.l3, caches.l3);
  sizes.fwd_strip_bytes = fit(sizes.fwd_strip_bytes, kReference.l2, caches.l2);
  sizes.bwd_tokens = fit(sizes.bwd_tokens, kReference.l2, caches.l2);
  sizes.bwd_panel_units = fit(sizes.bwd_panel_units, kReference.l2, caches.l2);
  return sizes;
}

TileSizes tile_sizes() { return in_use().get(); }

void set_tile_sizes(const TileSizes& sizes) {
  for (const TileSizeField& field : kTileSizeFields) {
    const int64_t value = sizes.*field.value;
    if (value < field.least || value > field.most || value % field.multiple != 0) {
      throw std::invalid_argument(std::string(field.name) + " must be a multiple of " +
                                  std::to_string(field.multiple) + " from " +
                                  std::to_string(field.least) + " to " +
                                  std::to_string(field.most) + ", got " + std::to_string(value));
    }
  }
  in_use().set(sizes);
}

}  // namespace fastlora
