// AMX: the kernels of AVX512-BF16, with the base product on tiles.
//
// A panel of pairs, [unit][lane], is what TDPBF16PS wants for its second factor, and rows of units are
// what it wants for its first: both are read where they lie. Two tiles of rows times two of columns
// fill four tiles of sums.
#include "../runtime/kernels.h"
#include "amx_tiles.h"

namespace fastlora {

namespace avx512_bf16 {
extern const Kernels kTable;
}

namespace FASTLORA_ISA {
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

struct Operands {
  const uint32_t* rows;
  int64_t row_stride;
  const uint32_t* panel;
  int64_t panel_stride;
  float* C;
  int64_t ldc;
};

template <int kTile>
void begin(float* C, int64_t ldc, bool accumulate) {
  if (accumulate) {
    tiles::load<kTile>(C, ldc * 4);
  } else {
    tiles::zero<kTile>();
  }
}

// One or two tiles of rows times one or two of columns, over `units` in steps of `step`.
template <bool kTwoRows, bool kTwoColumns>
void block(const Operands& o, int64_t units, int64_t step, bool accumulate) {
  float* lower = o.C + kRows * o.ldc;
  begin<0>(o.C, o.ldc, accumulate);
  if constexpr (kTwoColumns) begin<1>(o.C + kUnits, o.ldc, accumulate);
  if constexpr (kTwoRows) begin<2>(lower, o.ldc, accumulate);
  if constexpr (kTwoRows && kTwoColumns) begin<3>(lower + kUnits, o.ldc, accumulate);
  for (int64_t k = 0; k < units; k += step) {
    const uint32_t* panel = o.panel + k * o.panel_stride;
    tiles::load<4>(o.rows + k, o.row_stride * 4);
    tiles::load<6>(panel, o.panel_stride * 4);
    tiles::multiply_add<0, 4, 6>();
    if constexpr (kTwoColumns) {
      tiles::load<7>(panel + kUnits, o.panel_stride * 4);
      tiles::multiply_add<1, 4, 7>();
    }
    if constexpr (kTwoRows) {
      tiles::load<5>(o.rows + kRows * o.row_stride + k, o.row_stride * 4);
      tiles::multiply_add<2, 5, 6>();
    }
    if constexpr (kTwoRows && kTwoColumns) tiles::multiply_add<3, 5, 7>();
  }
  tiles::store<0>(o.C, o.ldc * 4);
  if constexpr (kTwoColumns) tiles::store<1>(o.C + kUnits, o.ldc * 4);
  if constexpr (kTwoRows) tiles::store<2>(lower, o.ldc * 4);
  if constexpr (kTwoRows && kTwoColumns) tiles::store<3>(lower + kUnits, o.ldc * 4);
}

void multiply(int mv, int64_t nr, const uint32_t* rows, int64_t row_stride, const uint32_t* panel,
              int64_t panel_stride, int64_t units, float* C, int64_t ldc, bool accumulate) {
  // Whole tiles of units first, then what is left of them: a tile has the shape of its last
  // configuration, and nothing past an operand is read.
  const int64_t whole = units / kUnits * kUnits;
  const struct {
    int64_t first, count, step;
  } parts[] = {{0, whole, kUnits}, {whole, units - whole, units - whole}};
  for (const auto& part : parts) {
    if (part.count == 0) continue;
    const bool add = accumulate || part.first > 0;
    for (int64_t i = 0; i < nr; i += 2 * kRows) {
      configure(nr - i, part.step);
      for (int64_t v = 0; v < mv; v += 2) {
        const Operands o{rows + i * row_stride + part.first,
                         row_stride,
                         panel + part.first * panel_stride + v * kUnits,
                         panel_stride,
                         C + i * ldc + v * kUnits,
                         ldc};
        const bool two_rows = nr - i > kRows, two_columns = mv - v > 1;
        if (two_rows && two_columns) {
          block<true, true>(o, part.count, part.step, add);
        } else if (two_rows) {
          block<true, false>(o, part.count, part.step, add);
        } else if (two_columns) {
          block<false, true>(o, part.count, part.step, add);
        } else {
          block<false, false>(o, part.count, part.step, add);
        }
      }
    }
  }
  tiles::release();
}

void lora_linear_fwd(LoraLinearFwd* layers, int64_t count, const ParallelFor& parallel) {
  for (int64_t i = 0; i < count; i++) layers[i].pair_product = multiply;
  avx512_bf16::kTable.lora_linear_fwd(layers, count, parallel);
}

void lora_linear_bwd(LoraLinearBwd* layers, int64_t count, const ParallelFor& parallel) {
  for (int64_t i = 0; i < count; i++) layers[i].pair_product = multiply;
  avx512_bf16::kTable.lora_linear_bwd(layers, count, parallel);
}

void lora_embedding_fwd(const LoraEmbeddingFwd& p, const ParallelFor& parallel) {
  avx512_bf16::kTable.lora_embedding_fwd(p, parallel);
}

void lora_embedding_bwd(const LoraEmbeddingBwd& p, const ParallelFor& parallel) {
  avx512_bf16::kTable.lora_embedding_bwd(p, parallel);
}

void quantize_4bit(const Quantize4bit& p, const ParallelFor& parallel) {
  avx512_bf16::kTable.quantize_4bit(p, parallel);
}

void dequantize_4bit(const Dequantize4bit& p, const ParallelFor& parallel) {
  avx512_bf16::kTable.dequantize_4bit(p, parallel);
}

void dora_norm(const DoraNorm& p, const ParallelFor& parallel) {
  avx512_bf16::kTable.dora_norm(p, parallel);
}

void dora_magnitude_fwd(const DoraMagnitudeFwd& p, const ParallelFor& parallel) {
  avx512_bf16::kTable.dora_magnitude_fwd(p, parallel);
}

void dora_magnitude_bwd(const DoraMagnitudeBwd& p, const ParallelFor& parallel) {
  avx512_bf16::kTable.dora_magnitude_bwd(p, parallel);
}

void dora_dropout_fwd(const DoraDropoutFwd& p, const ParallelFor& parallel) {
  avx512_bf16::kTable.dora_dropout_fwd(p, parallel);
}

void dora_dropout_bwd(const DoraDropoutBwd& p, const ParallelFor& parallel) {
  avx512_bf16::kTable.dora_dropout_bwd(p, parallel);
}

}  // namespace

extern const Kernels kTable;
const Kernels kTable = {"amx",
                        lora_linear_fwd,
                        lora_linear_bwd,
                        lora_embedding_fwd,
                        lora_embedding_bwd,
                        quantize_4bit,
                        dequantize_4bit,
                        dora_norm,
                        dora_magnitude_fwd,
                        dora_magnitude_bwd,
                        dora_dropout_fwd,
                        dora_dropout_bwd};

}  // namespace FASTLORA_ISA
}  // namespace fastlora
