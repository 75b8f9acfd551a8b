// dS = scaling * dy B, added up in dA by id; dB = scaling * dy^T S.
//
// Each element of dA and dB is summed by one tile, over the tokens in their order: the result does not
// depend on the number of threads.
#include "../linear/microkernel.h"
#include "../runtime/scratch.h"
#include "../runtime/table.h"
#include "../runtime/tiles.h"
#include "../weight/pack.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kTokens = 64;    // of a tile of S or dS
constexpr int64_t kColumns = 512;  // of dy, widened at a time for dS
constexpr int64_t kStrip = 64;     // columns of dy in a tile of dB
constexpr int64_t kHeight = 256;   // tokens of dy, widened at a time for dB

template <class T, class Adapter>
struct EmbeddingBwd {
  const LoraEmbeddingBwd& p;
  const int64_t panels;  // of ranks
  struct Memory {
    float* B;   // [panels][N][kPanel], for dA
    float* S;   // [panels][M][kPanel], for dB
    float* dS;  // [panels][M][kPanel], not yet scaled, for dA
  } memory;

  explicit EmbeddingBwd(const LoraEmbeddingBwd& params)
      : p(params), panels(ceil_div(p.R, kPanel)), memory{} {}

  int64_t ranks(int64_t panel) const { return min(kPanel, p.R - panel * kPanel); }
  int vectors(int64_t panel) const { return static_cast<int>(ceil_div(ranks(panel), kLanes)); }
  Block<T> gradient(int64_t m, int64_t rows, int64_t n, int64_t columns) const {
    return {static_cast<const T*>(p.dy) + m * p.lddy + n, p.lddy, rows, columns};
  }

  void pack(int64_t tile) {
    const int64_t n = tile * kColumns, rows = min(kColumns, p.N - n);
    for (int64_t panel = 0; panel < panels; panel++) {
      const Adapter* b = static_cast<const Adapter*>(p.lora_B) + n * p.R + panel * kPanel;
      pack_columns(Block<Adapter>{b, p.R, rows, ranks(panel)},
                   memory.B + (panel * p.N + n) * kPanel);
    }
  }

  void gather(int64_t tile) {
    const int64_t begin = tile * kTokens, end = min(p.M, begin + kTokens);
    for (int64_t r = 0; r < panels * kPanel; r++) {
      const Adapter* row = static_cast<const Adapter*>(p.lora_A) + r * p.V;
      float* out = memory.S + r / kPanel * p.M * kPanel + r % kPanel;
      for (int64_t m = begin; m < end; m++) {
        out[m * kPanel] = r < p.R ? to_float(row[p.ids[m]]) : 0.0f;
      }
    }
  }

  void shrink(int64_t tile) {
    const int64_t begin = tile * kTokens, tokens = min(kTokens, p.M - begin);
    const auto [rows] = take(Scratch::local, Piece<float>{kTokens * kColumns});
    for (int64_t n = 0; n < p.N; n += kColumns) {
      const int64_t columns = min(kColumns, p.N - n);
      pack_rows(F32{}, gradient(begin, tokens, n, columns), round_up(columns, kLanes), rows,
                kColumns);
      for (int64_t panel = 0; panel < panels; panel++) {
        multiply<F32>({.mv = vectors(panel),
                       .nr = tokens,
                       .units = columns,
                       .rows = {rows, kColumns},
                       .panel = {memory.B + (panel * p.N + n) * kPanel, kPanel},
                       .C = {memory.dS + (panel * p.M + begin) * kPanel, kPanel, n > 0}});
      }
    }
  }

  void scatter(int64_t r) {
    float* out = p.dA + r * p.V;
    memset(out, 0, static_cast<size_t>(p.V) * sizeof(float));
    const float* in = memory.dS + r / kPanel * p.M * kPanel + r % kPanel;
    for (int64_t m = 0; m < p.M; m++) {
      if (p.ids[m] != p.padding_idx) out[p.ids[m]] += p.scaling * in[m * kPanel];
    }
  }

  void grad_B(int64_t tile) {
    const int64_t n = tile * kStrip, columns = min(kStrip, p.N - n);
    const auto [rows, sums] = take(Scratch::local, Piece<float>{kHeight * kStrip},
                                   Piece<float>{panels * kStrip * kPanel});
    memset(sums, 0, static_cast<size_t>(panels * kStrip * kPanel) * sizeof(float));
    for (int64_t m = 0; m < p.M; m += kHeight) {
      const int64_t tokens = min(kHeight, p.M - m);
      pack_rows(F32{}, gradient(m, tokens, n, columns), round_up(columns, kLanes), rows, kStrip);
      for (int64_t panel = 0; panel < panels; panel++) {
        multiply<F32>({.mv = vectors(panel),
                       .nr = columns,
                       .units = tokens,
                       .rows = {rows, 1, kStrip},
                       .panel = {memory.S + (panel * p.M + m) * kPanel, kPanel},
                       .C = {sums + panel * kStrip * kPanel, kPanel, true}});
      }
    }
    for (int64_t i = 0; i < columns; i++) {
      for (int64_t r = 0; r < p.R; r++) {
        const float sum = sums[(r / kPanel * kStrip + i) * kPanel + r % kPanel];
        p.dB[(n + i) * p.R + r] = p.scaling * sum;
      }
    }
  }

  void run(const ParallelFor& parallel) {
    const int64_t tokens = panels * p.M * kPanel;
    memory = on_scratch(Scratch::shared, [&](Pieces& pieces) {
      return Memory{pieces.take<float>(panels * p.N * kPanel), pieces.take<float>(tokens),
                    pieces.take<float>(tokens)};
    });
    const int64_t blocks = ceil_div(p.M, kTokens);
    if (p.dA) {
      for_each_tile(parallel, this, &EmbeddingBwd::pack, ceil_div(p.N, kColumns));
      for_each_tile(parallel, this, &EmbeddingBwd::shrink, blocks);
      for_each_tile(parallel, this, &EmbeddingBwd::scatter, p.R);
    }
    if (p.dB) {
      for_each_tile(parallel, this, &EmbeddingBwd::gather, blocks);
      for_each_tile(parallel, this, &EmbeddingBwd::grad_B, ceil_div(p.N, kStrip));
    }
  }
};

}  // namespace

void lora_embedding_bwd(const LoraEmbeddingBwd& p, const Machine& machine) {
  with_type(p.dtype, [&]<class T>() {
    with_type(p.adapter_dtype,
              [&]<class Adapter>() { EmbeddingBwd<T, Adapter>(p).run(machine.parallel); });
  });
  trim_scratch(Scratch::shared);
}

}  // namespace fastlora::FASTLORA_ISA
