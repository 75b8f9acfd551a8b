// The product that every linear kernel consists of, as data.
#pragma once

#include <cstdint>

namespace fastlora {

// C[nr][width] (+)= rows[nr][units] * panel[units][width], width = mv vectors of lanes.
//
// A `Unit` is a float, or a pair of bf16 that are neighbours along the summed dimension. Strides are
// in units and in floats.
template <class Unit>
struct TileProduct {
  int mv;
  int64_t nr, units;
  const Unit* rows;  // rows[i * row_stride + k * row_step]
  int64_t row_stride, row_step;
  const Unit* panel;
  int64_t panel_stride;
  float* C;
  int64_t ldc;
  bool accumulate;  // add to C instead of overwriting it
};

// The same for vectors of 16 lanes and row_step 1, on a matrix unit.
using PairProduct = void (*)(const TileProduct<uint32_t>&);

}  // namespace fastlora
