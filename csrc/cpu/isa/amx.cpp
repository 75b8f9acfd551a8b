// AMX: the base product on tiles, for the kernels of AVX512-BF16.
//
// TDPBF16PS takes rows of units and a panel of pairs, [unit][lane], just as they are in memory. Two
// tiles of rows times two of columns fill four tiles of sums.
#include "amx_tiles.h"
#include "product.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kRows = 16;   // of a tile
constexpr int64_t kUnits = 16;  // pairs of bf16 in a tile's row; fp32 sums in one

// Tiles 2 i + j hold the sums of row tile i and column tile j, 4 + i rows, 6 + j columns.
void configure(int64_t rows, int64_t units) {
  tiles::Config config;
  const auto set = [&](int tile, int64_t height, int64_t width) {
    config.rows[tile] = static_cast<uint8_t>(height);
    config.row_bytes[tile] = static_cast<uint16_t>(height ? width * 4 : 0);
  };
  for (int i = 0; i < 2; i++) {
    const int64_t left = rows - i * kRows, height = left < 0 ? 0 : left < kRows ? left : kRows;
    set(2 * i, height, kUnits);
    set(2 * i + 1, height, kUnits);
    set(4 + i, height, units);
    set(6 + i, units, kUnits);
  }
  tiles::configure(config);
}

template <int kTile>
void begin(float* C, int64_t ldc, bool accumulate) {
  if (accumulate) {
    tiles::load<kTile>(C, ldc * 4);
  } else {
    tiles::zero<kTile>();
  }
}

// One or two tiles of rows times one or two of columns, over o.units in steps of `step`.
template <bool kTwoRows, bool kTwoColumns>
void block(const TileProduct<uint32_t>& o, int64_t step) {
  const auto [C, ldc, accumulate] = o.C;
  float* lower = C + kRows * ldc;
  begin<0>(C, ldc, accumulate);
  if constexpr (kTwoColumns) begin<1>(C + kUnits, ldc, accumulate);
  if constexpr (kTwoRows) begin<2>(lower, ldc, accumulate);
  if constexpr (kTwoRows && kTwoColumns) begin<3>(lower + kUnits, ldc, accumulate);
  for (int64_t k = 0; k < o.units; k += step) {
    const uint32_t* panel = o.panel.data + k * o.panel.stride;
    tiles::load<4>(o.rows.data + k, o.rows.stride * 4);
    tiles::load<6>(panel, o.panel.stride * 4);
    tiles::multiply_add<0, 4, 6>();
    if constexpr (kTwoColumns) {
      tiles::load<7>(panel + kUnits, o.panel.stride * 4);
      tiles::multiply_add<1, 4, 7>();
    }
    if constexpr (kTwoRows) {
      tiles::load<5>(o.rows.data + kRows * o.rows.stride + k, o.rows.stride * 4);
      tiles::multiply_add<2, 5, 6>();
    }
    if constexpr (kTwoRows && kTwoColumns) tiles::multiply_add<3, 5, 7>();
  }
  tiles::store<0>(C, ldc * 4);
  if constexpr (kTwoColumns) tiles::store<1>(C + kUnits, ldc * 4);
  if constexpr (kTwoRows) tiles::store<2>(lower, ldc * 4);
  if constexpr (kTwoRows && kTwoColumns) tiles::store<3>(lower + kUnits, ldc * 4);
}

}  // namespace

void multiply(const TileProduct<uint32_t>& p) {
  // Whole tiles of units first, then what is left of them: a tile has the shape of its last
  // configuration, and nothing past an operand is read.
  const int64_t whole = p.units / kUnits * kUnits;
  const struct {
    int64_t first, count, step;
  } parts[] = {{0, whole, kUnits}, {whole, p.units - whole, p.units - whole}};
  for (const auto& part : parts) {
    if (part.count == 0) continue;
    TileProduct<uint32_t> o = p;
    o.units = part.count;
    o.C.accumulate = p.C.accumulate || part.first > 0;
    for (int64_t i = 0; i < p.nr; i += 2 * kRows) {
      configure(p.nr - i, part.step);
      for (int v = 0; v < p.mv; v += 2) {
        o.rows.data = p.rows.data + i * p.rows.stride + part.first;
        o.panel.data = p.panel.data + part.first * p.panel.stride + v * kUnits;
        o.C.data = p.C.data + i * p.C.stride + v * kUnits;
        const bool two_rows = p.nr - i > kRows, two_columns = p.mv - v > 1;
        if (two_rows && two_columns) {
          block<true, true>(o, part.step);
        } else if (two_rows) {
          block<true, false>(o, part.step);
        } else if (two_columns) {
          block<false, true>(o, part.step);
        } else {
          block<false, false>(o, part.step);
        }
      }
    }
  }
  tiles::release();
}

}  // namespace fastlora::FASTLORA_ISA
