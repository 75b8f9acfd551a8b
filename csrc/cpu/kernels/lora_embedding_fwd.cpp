// y[m] = weight_scale * E[id] + scaling * S[m] B^T: rows of the table are read, and y is rounded, once.
#include "../linear/microkernel.h"
#include "../runtime/scratch.h"
#include "../runtime/table.h"
#include "../runtime/tiles.h"
#include "../weight/pack.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kTokens = 64;      // of a tile
constexpr int64_t kStripPanels = 8;  // panels of columns in a tile

template <class T, class Adapter>
struct EmbeddingFwd {
  const LoraEmbeddingFwd& p;
  const int64_t padded;  // ranks of a packed panel
  const int64_t panels;
  float* columns;  // [panels][padded][mv kLanes], B^T

  explicit EmbeddingFwd(const LoraEmbeddingFwd& params)
      : p(params), padded(round_up(p.R, kLanes)), panels(ceil_div(p.N, kPanel)), columns(nullptr) {}

  static int vectors(int64_t count) {
    return static_cast<int>(ceil_div(min(count, kPanel), kLanes));
  }

  void pack(int64_t panel) {
    const int64_t n = panel * kPanel;
    const Block<Adapter> block{static_cast<const Adapter*>(p.lora_B) + n * p.R, p.R,
                               min(kPanel, p.N - n), p.R};
    pack_tokens(F32{}, block, padded, vectors(p.N - n), columns + panel * padded * kPanel);
  }

  void rows(int64_t tile) {
    const int64_t strips = ceil_div(panels, kStripPanels);
    const int64_t begin = tile / strips * kTokens, tokens = min(kTokens, p.M - begin);
    const int64_t first = tile % strips * kStripPanels;
    const auto [S, terms] =
        take(Scratch::local, Piece<float>{kTokens * p.R}, Piece<float>{kTokens * kPanel});
    // Along a row of A, so that one page of it is looked up for all tokens.
    for (int64_t r = 0; r < p.R; r++) {
      const Adapter* row = static_cast<const Adapter*>(p.lora_A) + r * p.V;
      for (int64_t i = 0; i < tokens; i++) S[i * p.R + r] = to_float(row[p.ids[begin + i]]);
    }
    for (int64_t panel = first; panel < min(panels, first + kStripPanels); panel++) {
      const int64_t n = panel * kPanel, count = min(kPanel, p.N - n);
      const int mv = vectors(p.N - n);
      multiply<F32>({.mv = mv,
                     .nr = tokens,
                     .units = p.R,
                     .rows = {S, p.R},
                     .panel = {columns + panel * padded * kPanel, mv * kLanes},
                     .C = {terms, kPanel, false}});
      for (int64_t i = 0; i < tokens; i++) {
        const T* e = static_cast<const T*>(p.weight) + p.ids[begin + i] * p.N + n;
        T* y = static_cast<T*>(p.y) + (begin + i) * p.N + n;
        for (int64_t j = 0; j < count; j += kLanes) {
          const Vec term = mul(load(terms + i * kPanel + j), broadcast(p.scaling));
          const Vec base = mul(load(e + j, count - j), broadcast(p.weight_scale));
          store(y + j, add(base, term), count - j);
        }
      }
    }
  }

  void run(const ParallelFor& parallel) {
    std::tie(columns) = take(Scratch::shared, Piece<float>{panels * padded * kPanel});
    for_each_tile(parallel, this, &EmbeddingFwd::pack, panels, kStripPanels);
    const int64_t strips = ceil_div(panels, kStripPanels);
    for_each_tile(parallel, this, &EmbeddingFwd::rows, ceil_div(p.M, kTokens) * strips, strips);
  }
};

}  // namespace

void lora_embedding_fwd(const LoraEmbeddingFwd& p, const Machine& machine) {
  if (p.M == 0) return;
  with_type(p.dtype, [&]<class T>() {
    with_type(p.adapter_dtype,
              [&]<class Adapter>() { EmbeddingFwd<T, Adapter>(p).run(machine.parallel); });
  });
  trim_scratch(Scratch::shared);
}

}  // namespace fastlora::FASTLORA_ISA
