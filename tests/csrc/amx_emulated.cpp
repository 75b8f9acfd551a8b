// amx.cpp on tiles in plain code, for processors without AMX: same results, and an exception where the
// processor would raise a fault. Intel 64 and IA-32 Software Developer's Manual, volume 1, chapter 18,
// and TDPBF16PS in volume 2.
#define FASTLORA_ISA amx_emulated
#define FASTLORA_AMX_EMULATED

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cpu/isa/amx_tiles.h"

namespace fastlora::FASTLORA_ISA::tiles {
namespace {

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;  // palette 1

struct Tile {
  int rows, row_bytes;
  alignas(64) uint8_t data[kMaxRows][kMaxBytes];
};

thread_local Tile state[kTiles];
thread_local bool configured = false;

void must(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

Tile& used(int tile) {
  must(configured, "a tile is used without a configuration");
  must(state[tile].rows > 0, "a tile without rows is used");
  return state[tile];
}

// bf16 to fp32; denormals count as zero, as they do for the processor.
float widened(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  if ((bits & 0x7f80) == 0) bits &= 0x8000;
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

void configure(const Config& config) {
  must(config.palette == 1 && config.start_row == 0, "palette 1 from row 0 is the only one");
  for (const uint8_t byte : config.reserved) must(byte == 0, "reserved bytes must be zero");
  for (int t = 0; t < 16; t++) {
    const int rows = config.rows[t], bytes = config.row_bytes[t];
    must((rows == 0) == (bytes == 0), "a tile has rows without bytes, or bytes without rows");
    must(rows <= kMaxRows && bytes <= kMaxBytes, "a tile is too large");
    must(t < kTiles || rows == 0, "palette 1 has eight tiles");
    if (t >= kTiles) continue;
    state[t] = {};
    state[t].rows = rows;
    state[t].row_bytes = bytes;
  }
  configured = true;
}

void release() { configured = false; }

template <int T>
void zero() {
  Tile& tile = used(T);
  std::memset(tile.data, 0, sizeof tile.data);
}

template <int T>
void load(const void* p, int64_t stride) {
  Tile& tile = used(T);
  std::memset(tile.data, 0, sizeof tile.data);
  for (int i = 0; i < tile.rows; i++) {
    std::memcpy(tile.data[i], static_cast<const char*>(p) + i * stride,
                static_cast<size_t>(tile.row_bytes));
  }
}

template <int T>
void store(void* p, int64_t stride) {
  const Tile& tile = used(T);
  for (int i = 0; i < tile.rows; i++) {
    std::memcpy(static_cast<char*>(p) + i * stride, tile.data[i],
                static_cast<size_t>(tile.row_bytes));
  }
}

template <int C, int A, int B>
void multiply_add() {
  static_assert(C != A && C != B && A != B, "the three tiles must differ");
  Tile& c = used(C);
  const Tile &a = used(A), &b = used(B);
  must(c.row_bytes % 4 == 0 && a.row_bytes % 4 == 0, "rows must be whole dwords");
  must(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes == b.rows * 4,
       "the tiles' shapes don't fit");
  for (int m = 0; m < c.rows; m++) {
    for (int n = 0; n < c.row_bytes / 4; n++) {
      float even = 0, odd = 0;
      for (int k = 0; k < b.rows; k++) {
        even = std::fma(widened(&a.data[m][4 * k]), widened(&b.data[k][4 * n]), even);
        odd = std::fma(widened(&a.data[m][4 * k + 2]), widened(&b.data[k][4 * n + 2]), odd);
      }
      float sum;
      std::memcpy(&sum, &c.data[m][4 * n], sizeof sum);
      sum += even + odd;
      std::memcpy(&c.data[m][4 * n], &sum, sizeof sum);
    }
  }
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA::tiles

#include "cpu/isa/amx.cpp"
