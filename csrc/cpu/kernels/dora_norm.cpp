// norms[n] = |W[n] + scaling * (B A)[n]|: the sum is formed a block at a time, and never stored. So it
// costs what W A^T would, and loses nothing where W and B A cancel.
#include "../scratch.h"
#include "../table.h"
#include "../tiles.h"
#include "../with_weight.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

constexpr int64_t kRows = 48;      // of W in a tile: whole register tiles of any set
constexpr int64_t kColumns = 256;  // of W, made fp32 at a time

template <class Source, class Adapter>
struct Norm {
  const DoraNorm& p;
  const Operand<Source> operand;
  const int64_t N, K;
  float* A;  // [panels of columns][R][kPanel]

  Norm(const DoraNorm& params, const float* absmax, float* panels)
      : p(params),
        operand(params.weight, absmax),
        N(params.weight.N),
        K(params.weight.K),
        A(panels) {}

  static size_t shared_bytes(const DoraNorm& p) {
    return Pieces::bytes<float>(ceil_div(p.weight.K, kPanel) * p.R * kPanel);
  }

  void pack(int64_t panel) {
    const int64_t k = panel * kPanel;
    const Block<Adapter> block{static_cast<const Adapter*>(p.lora_A) + k, K, p.R,
                               min(kPanel, K - k)};
    pack_columns(block, KeepRows{nullptr, 0}, 0, A + panel * p.R * kPanel);
  }

  void rows(int64_t tile) {
    const int64_t n = tile * kRows, count = min(kRows, N - n), padded = round_up(p.R, kLanes);
    Pieces pieces{static_cast<char*>(scratch(
        Scratch::local,
        Pieces::bytes<float>(kRows * padded) + Pieces::bytes<float>(kRows * kLanes) +
            Pieces::bytes<float>(kRows * kColumns) + Pieces::bytes<float>(kRows * kPanel)))};
    float* B = pieces.take<float>(kRows * padded);
    float* squares = pieces.take<float>(kRows * kLanes);
    float* W = pieces.take<float>(kRows * kColumns);
    float* terms = pieces.take<float>(kRows * kPanel);
    const Block<Adapter> block{static_cast<const Adapter*>(p.lora_B) + n * p.R, p.R, count, p.R};
    pack_rows(F32{}, block, padded, B, padded);
    memset(squares, 0, static_cast<size_t>(kRows * kLanes) * sizeof(float));
    for (int64_t k = 0; k < K; k += kColumns) {
      const int64_t columns = min(kColumns, K - k);
      weight_rows(F32{}, operand.source, n, count, k, columns, W, kColumns);
      for (int64_t c = 0; c < columns; c += kPanel) {
        const int64_t width = min(kPanel, columns - c);
        multiply<F32>(static_cast<int>(ceil_div(width, kLanes)), count, B, {padded, 1},
                      A + (k + c) / kPanel * p.R * kPanel, kPanel, p.R, terms, kPanel, false);
        add_squares(W + c, terms, count, width, squares);
      }
    }
    for (int64_t i = 0; i < count; i++) {
      p.norms[n + i] = __builtin_sqrtf(sum(load(squares + i * kLanes)));
    }
  }

  void add_squares(const float* W, const float* terms, int64_t count, int64_t width,
                   float* squares) const {
    const Vec scaling = broadcast(p.scaling);
    for (int64_t i = 0; i < count; i++) {
      Vec total = load(squares + i * kLanes);
      for (int64_t j = 0; j < width; j += kLanes) {
        const Vec v = fma(load(terms + i * kPanel + j), scaling, load(W + i * kColumns + j));
        total = fma(v, v, total);
      }
      store(squares + i * kLanes, total);
    }
  }

  void run(const ParallelFor& parallel) {
    for_each_tile(parallel, this, &Norm::pack, ceil_div(K, kPanel), 8);
    for_each_tile(parallel, this, &Norm::rows, ceil_div(N, kRows));
  }
};

template <class Source>
void norms_of(const DoraNorm& p, const ParallelFor& parallel) {
  with_type(p.adapter_dtype, [&](auto* adapter) {
    using Adapter = std::remove_const_t<std::remove_pointer_t<decltype(adapter)>>;
    const int64_t blocks = is_nested(p.weight) ? blocks_of(p.weight) : 0;
    const size_t bytes = Norm<Source, Adapter>::shared_bytes(p) + Pieces::bytes<float>(blocks);
    Pieces pieces{static_cast<char*>(scratch(Scratch::shared, bytes))};
    const float* absmax = plain_absmax(p.weight, parallel, pieces.take<float>(blocks));
    Norm<Source, Adapter>(p, absmax, reinterpret_cast<float*>(pieces.next)).run(parallel);
  });
}

}  // namespace

void dora_norm(const DoraNorm& p, const ParallelFor& parallel) {
  if (p.weight.dense == nullptr) {
    norms_of<FourBit>(p, parallel);
  } else {
    with_type(p.weight.compute_dtype, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      p.weight.turned ? norms_of<Turned<T>>(p, parallel) : norms_of<Dense<T>>(p, parallel);
    });
  }
  trim_scratch(Scratch::shared);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
