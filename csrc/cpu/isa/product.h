// The product that every linear kernel consists of, as data.
#pragma once

#include <cstdint>

namespace fastlora {

// C[i][j] (+)= sum over k of rows[i][k] * panel[k][j],   i < nr, j < mv vectors of lanes, k < units
//
// A `Unit` is a float, or a pair of bf16 that are neighbours along k. Strides are in elements.
template <class Unit>
struct RowOperand {
  const Unit* data;  // data[i * stride + k * step]
  int64_t stride, step = 1;
};

template <class Unit>
struct PanelOperand {
  const Unit* data;  // data[k * stride + j]
  int64_t stride;
};

struct Sums {
  float* data;  // data[i * stride + j]
  int64_t stride;
  bool accumulate;  // add to them instead of overwriting them
};

template <class Unit>
struct TileProduct {
  int mv;
  int64_t nr, units;
  RowOperand<Unit> rows;
  PanelOperand<Unit> panel;
  Sums C;
};

// The product of a matrix unit, for vectors of 16 lanes and step 1.
using PairProduct = void (*)(const TileProduct<uint32_t>&);

}  // namespace fastlora
