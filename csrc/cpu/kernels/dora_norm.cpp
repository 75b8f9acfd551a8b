// norms[n] = |W[n] + scaling * (B A)[n]|: the sum is formed in registers and never stored. It costs as
// much as W A^T, and loses nothing where W and B A cancel.
#include "../runtime/scratch.h"
#include "../runtime/table.h"
#include "../runtime/tiles.h"
#include "../weight/with_weight.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kRows = 48;      // of W in a tile: whole register tiles of any set
constexpr int64_t kColumns = 512;  // of W, decoded or transposed at a time
constexpr int64_t kAhead = 2;      // panels for which W is asked for early

// Rows of W as they are read: where they lie, from one to the next, and how many columns are left.
template <class T>
struct Rows {
  const T* data;
  int64_t ld, count;
};

// squares[i][kLanes] += (W[i][j] + scaling * sum over r of B[i][r] * panel[r][j])^2, i < NR.
template <int NR, bool kWhole, class T>
__attribute__((noinline)) static void add_squares(const float* __restrict B, int64_t ldb,
                                                  const float* __restrict panel, int64_t R,
                                                  float scaling, Rows<T> W,
                                                  float* __restrict squares) {
  constexpr int MV = kPanelVectors;
  Vec c[NR][MV];
#pragma GCC unroll 16
  for (int i = 0; i < NR; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < MV; j++) c[i][j] = zero();
  }
  for (int64_t r = 0; r < R; r++) {
    Vec p[MV];
#pragma GCC unroll 4
    for (int j = 0; j < MV; j++) p[j] = load(panel + r * kPanel + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < NR; i++) {
      const Vec b = broadcast(B[i * ldb + r]);
#pragma GCC unroll 4
      for (int j = 0; j < MV; j++) c[i][j] = fma(b, p[j], c[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < NR; i++) {
    const T* w = W.data + i * W.ld;
    Vec total = load(squares + i * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < MV; j++) {
      const int64_t left = W.count - j * kLanes;
      if (!kWhole && left <= 0) break;
      const Vec base = kWhole ? load(w + j * kLanes) : load(w + j * kLanes, left);
      const Vec v = fma(c[i][j], broadcast(scaling), base);
      total = fma(v, v, total);
    }
    store(squares + i * kLanes, total);
  }
}

template <class Compute, class Source, class Adapter>
struct Norm {
  // Others are decoded or transposed first.
  static constexpr bool kReadAsStored = kStoredByRows<Source> && !std::is_same_v<Source, FourBit>;

  const DoraNorm& p;
  const Operand<Source> operand;
  const int64_t N, K, padded;  // padded: ranks of a row of B
  float* A;                    // [panels of columns][R][kPanel]

  Norm(const DoraNorm& params, const float* absmax, float* panels)
      : p(params),
        operand(params.weight, absmax),
        N(params.weight.N),
        K(params.weight.K),
        padded(round_up(params.R, kLanes)),
        A(panels) {}

  void pack(int64_t panel) {
    const int64_t k = panel * kPanel;
    const Block<Adapter> block{static_cast<const Adapter*>(p.lora_A) + k, K, p.R,
                               min(kPanel, K - k)};
    pack_columns(block, A + panel * p.R * kPanel);
  }

  void rows(int64_t tile) {
    using Unit = typename Compute::Unit;
    const int64_t n = tile * kRows, count = min(kRows, N - n), units = kColumns / Compute::kPerUnit;
    const auto [B, squares, W] = take(Scratch::local, Piece<float>{kRows * padded},
                                      Piece<float>{kRows * kLanes}, Piece<Unit>{kRows * units});
    const Block<Adapter> block{static_cast<const Adapter*>(p.lora_B) + n * p.R, p.R, count, p.R};
    pack_rows(F32{}, block, padded, B, padded);
    memset(squares, 0, static_cast<size_t>(kRows * kLanes) * sizeof(float));
    for (int64_t k = 0; k < K; k += kColumns) {
      const int64_t columns = min(kColumns, K - k);
      if constexpr (kReadAsStored) {
        add(B, k, count, Rows{operand.source.data + n * K + k, K, columns}, squares);
      } else {
        weight_rows(Compute{}, operand.source, n, count, k, columns, W, units);
        if constexpr (Compute::kPerUnit == 2) {
          add(B, k, count, Rows{reinterpret_cast<const bf16*>(W), kColumns, columns}, squares);
        } else {
          add(B, k, count, Rows<float>{W, kColumns, columns}, squares);
        }
      }
    }
    for (int64_t i = 0; i < count; i++) {
      p.norms[n + i] = __builtin_sqrtf(sum(load(squares + i * kLanes)));
    }
  }

  // Of columns k and on.
  template <class T>
  void add(const float* B, int64_t k, int64_t count, Rows<T> W, float* squares) const {
    constexpr int64_t kTile = kTileRows[kPanelVectors];
    for (; W.count > 0; W.count -= kPanel, W.data += kPanel, k += kPanel) {
      for (int64_t i = 0; i < count; i += kTile) {
        const Rows<T> some{W.data + i * W.ld, W.ld, W.count};
        for (int64_t row = 0; row < min(kTile, count - i); row++) {
          const T* ahead = some.data + row * W.ld + kAhead * kPanel;
          for (int64_t j = 0; j < kPanel; j += 64 / static_cast<int64_t>(sizeof(T))) {
            prefetch(ahead + j);
          }
        }
        const float *b = B + i * padded, *panel = A + k / kPanel * p.R * kPanel;
        float* out = squares + i * kLanes;
        with_size<kTile>(min(kTile, count - i), [&]<int NR>() __attribute__((always_inline)) {
          W.count >= kPanel ? add_squares<NR, true>(b, padded, panel, p.R, p.scaling, some, out)
                            : add_squares<NR, false>(b, padded, panel, p.R, p.scaling, some, out);
        });
      }
    }
  }

  void run(const ParallelFor& parallel) {
    for_each_tile(parallel, this, &Norm::pack, ceil_div(K, kPanel), 8);
    for_each_tile(parallel, this, &Norm::rows, ceil_div(N, kRows));
  }
};

template <class Compute, class Source>
void norms_of(const DoraNorm& p, const ParallelFor& parallel) {
  with_type(p.adapter_dtype, [&]<class Adapter>() {
    const auto [memory, A] =
        take(Scratch::shared, Piece<float>{is_nested(p.weight) ? blocks_of(p.weight) : 0},
             Piece<float>{ceil_div(p.weight.K, kPanel) * p.R * kPanel});
    const float* absmax = plain_absmax(p.weight, parallel, memory);
    Norm<Compute, Source, Adapter>(p, absmax, A).run(parallel);
  });
}

}  // namespace

void dora_norm(const DoraNorm& p, const Machine& machine) {
  if (p.weight.dense) {
    with_type(p.weight.compute_dtype, [&]<class T>() {
      p.weight.transposed ? norms_of<F32, Transposed<T>>(p, machine.parallel)
                          : norms_of<F32, Dense<T>>(p, machine.parallel);
    });
#if defined(FASTLORA_PAIRS)
  } else if (p.weight.compute_dtype == DType::bf16) {
    norms_of<Bf16Pair, FourBit>(p, machine.parallel);
#endif
  } else {
    norms_of<F32, FourBit>(p, machine.parallel);
  }
  trim_scratch(Scratch::shared);
}

}  // namespace fastlora::FASTLORA_ISA
