// The tile kernel of qlora_gemm_fwd and qlora_gemm_dx (struct QloraGemm in kernels.h), for rows of
// whole runs of codes and for ragged ones (code_runs.cuh).
//
// A block makes a tile of 128 tokens (64, if there are no more) by 128 outputs with eight warps, each
// of half the tokens and a quarter of the outputs. Forward and dx differ in one point: the sum runs
// along W's rows or down its columns. Either way the packed bytes are
// decoded into a swizzled 16-bit tile of shared memory, in W's own order; `ldmatrix` or its
// transposing form then reads the operand.
//
// A step of the sum is 64 long. While the tensor cores work on step i, the copies of x for step
// i + 1 and of the codes for step i + 2 are under way, and the codes of step i + 1 are decoded, a
// quarter between two groups of products: ptxas keeps the order of shared memory accesses, so
// decoding in one piece would leave the tensor cores idle meanwhile.
//
// The LoRA term comes first, into the same accumulators, as a product of short numbers: fp32 values
// are split into two bf16 parts, and the product of the two lower parts, 2^-16 of it, is left out.
#pragma once

#include "cuda/code_runs.cuh"
#include "cuda/dropout.cuh"
#include "cuda/finish.cuh"
#include "cuda/launch.cuh"
#include "cuda/parts.cuh"

namespace fastlora::cuda {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kMostTokens = 128, kFewTokens = 64, kOutputs = 128;  // of a tile
constexpr int kProduct = 16;  // terms of one tensor core instruction
constexpr int kRanks = 32;    // ranks at once: high and low parts fill a step
static_assert(kStep == 2 * kRun && kOutputs * kStep == kThreads * kRun);
constexpr int kWarpOutputs = 32;

// Shared memory. A tile's rows have 128 bytes, eight chunks of 16.
constexpr uint32_t kRowBytes = 128, kChunkBytes = 16;
constexpr uint32_t kWBytes = kOutputs * kRowBytes;
constexpr uint32_t kHalfBytes = kStep * kRowBytes;  // dx: W's tile is two halves of 64 columns
template <class Codes, bool kForward, int kTokens>
struct Layout {
  static constexpr uint32_t kPackedBytes = kThreads * Codes::kBytes;
  static constexpr uint32_t kXBytes = kTokens * kRowBytes;
  static constexpr uint32_t kXAt = 0, kWAt = kXAt + 2 * kXBytes, kPackedAt = kWAt + 2 * kWBytes;
  static constexpr uint32_t kTablesAt = kPackedAt + 2 * kPackedBytes;
  static constexpr uint32_t kKeepAt = kTablesAt + kTableBytes;  // dx: four words for each token
  static constexpr uint32_t kBytes = kKeepAt + (kForward ? 0 : kTokens * sizeof(Words4));
};

struct GemmParams {
  QloraGemm op;
  int64_t outputs;  // of a row of y
  int inputs;       // terms of the sum
  int token_tiles;
  int steps, splits;  // the sum is cut into `splits` parts; their results meet in `partial`
  float* partial;     // [splits, M, outputs], or null: then y is written
};

// Where chunk `chunk` of row `row` lies: rows 128 bytes apart fall on the same banks, so their
// chunks are permuted.
FASTLORA_DEVICE uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>(row) * kRowBytes +
         static_cast<uint32_t>(chunk ^ (row & 7)) * kChunkBytes;
}

// The address of another row, a multiple of eight away, and of chunk c ^ `chunk` instead of c.
FASTLORA_DEVICE uint32_t moved(uint32_t address, int rows, int chunk) {
  return (address ^ static_cast<uint32_t>(chunk) * kChunkBytes) +
         static_cast<uint32_t>(rows) * kRowBytes;
}

// The thread's place in its tile, and the tile's in the product.
template <int kTokens>
struct Place {
  static constexpr int kWarpTokens = kTokens / 2;
  FASTLORA_DEVICE explicit Place(const GemmParams& p) {
    thread = thread_index();
    lane = thread % kWarp;
    warp = thread / kWarp;
    warp_token = warp % 2 * kWarpTokens;
    warp_output = warp / 2 * kWarpOutputs;
    const int block = block_index(), tile = block / p.splits;
    split = block % p.splits;
    // Blocks that run at the same time share W's columns.
    token0 = tile % p.token_tiles * kTokens;
    output0 = tile / p.token_tiles * kOutputs;
    tokens = static_cast<int>(smaller<int64_t>(p.op.M - token0, kTokens));
  }
  int thread, lane, warp, warp_token, warp_output;
  int split, token0, output0;
  int tokens;  // of the tile that exist
};

template <class T, class Codes, bool kForward, int kTokens>
struct Gemm : Place<kTokens> {
  using At = Place<kTokens>;
  using Memory = Layout<Codes, kForward, kTokens>;
  using Scales = typename Codes::Scales;
  using At::split, At::token0, At::output0, At::tokens;
  using At::thread, At::lane, At::warp, At::warp_token, At::warp_output;
  static constexpr int kRowTiles = At::kWarpTokens / 16;  // of a warp

  FASTLORA_DEVICE explicit Gemm(const GemmParams& params) : At(params), p(params) {}

  const GemmParams& p;
  const uint32_t shared = shared_memory();
  const int begin = part_start(p.steps, split, p.splits);
  const int end = part_start(p.steps, split + 1, p.splits);

  // Where the thread reads in the tiles.
  const uint32_t x_read = swizzled(warp_token + lane % 16, lane / 16);
  const uint32_t w_read = kForward ? swizzled(warp_output + lane / 16 * 8 + lane % 8, lane / 8 % 2)
                                   : static_cast<uint32_t>(warp_output / kStep) * kHalfBytes +
                                         swizzled(lane % 16, warp_output % kStep / 8 + lane / 16);

  // The thread's part of x in the step that is loaded next: a chunk of every 32nd row.
  const T* x_source = static_cast<const T*>(p.op.x) + int64_t{token0 + thread / 8} * p.op.ldx +
                      begin * kStep + thread % 8 * 8;
  // What it decodes of W's tile: a run of a row, four chunks. In the sum's next step the run is that
  // of the same row 64 columns further (forward), or of the 64th row below (dx).
  const int code_row = kForward ? thread / 2 : thread / 2 % kStep;
  const int code_half = kForward ? 0 : thread / (kThreads / 2);
  const uint32_t w_write =
      static_cast<uint32_t>(code_half) * kHalfBytes + swizzled(code_row, thread % 2 * 4);
  Codes codes{p.op.weight, kForward ? output0 + code_row : code_row,
              thread % 2 * kRun + (kForward ? 0 : output0 + code_half * kStep), begin};
  float sums[kRowTiles][4][4] = {};  // [16 tokens][8 outputs][element of an mma's result]

  FASTLORA_DEVICE uint32_t x_tile(int i) const {
    return shared + Memory::kXAt + static_cast<uint32_t>(i & 1) * Memory::kXBytes;
  }
  FASTLORA_DEVICE uint32_t w_tile(int i) const {
    return shared + Memory::kWAt + static_cast<uint32_t>(i & 1) * kWBytes;
  }
  FASTLORA_DEVICE uint32_t packed(int i) const {
    return shared + Memory::kPackedAt + static_cast<uint32_t>(i & 1) * Memory::kPackedBytes +
           static_cast<uint32_t>(thread) * Codes::kBytes;
  }

  // ---- loads -----------------------------------------------------------------------------------

  // Each call loads one step further.
  FASTLORA_DEVICE void load_x(int step) {
    const int row = thread / 8, chunk = thread % 8, left = p.inputs - step * kStep - chunk * 8;
    const int bytes = smaller(larger(left, 0), 8) * 2;
    // Step i of the sum lies in tile i + 1: the LoRA term, before them, has tile 0.
    const uint32_t to = x_tile(step + 1) + swizzled(row, chunk);
    const T* source = x_source;
#pragma unroll
    for (int down = 0; down < kTokens; down += kThreads / 8) {
      copy_async(moved(to, down, 0), source, row + down < tokens ? bytes : 0);
      source += kThreads / 8 * p.op.ldx;
    }
    x_source += kStep;
  }

  // Starts the copy of the thread's codes, and loads their scales.
  FASTLORA_DEVICE Scales load_codes(int step) { return codes.load(step, packed(step)); }

  // ---- decoding --------------------------------------------------------------------------------

  FASTLORA_DEVICE typename Codes::Decoder decoder_of(int step, const Scales& scales) const {
    return codes.decoder(step, packed(step), scales, shared + Memory::kTablesAt);
  }

  // A quarter of the thread's run, eight codes, to W's tile.
  FASTLORA_DEVICE void decode_quarter(int step, int quarter,
                                      typename Codes::Decoder& decoder) const {
    store_shared<Words4>(moved(w_tile(step) + w_write, 0, quarter), decoder.quarter(quarter));
  }

  // ---- products --------------------------------------------------------------------------------

  // Adds terms [16 x_part, + 16) of x's tile times terms [16 w_part, + 16) of W's.
  template <class Number>
  FASTLORA_DEVICE void multiply_part(uint32_t x, int x_part, uint32_t w, int w_part) {
    uint32_t b[2][4];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      if constexpr (kForward) {
        load_matrices(b[j], moved(w + w_read, 16 * j, 2 * w_part));
      } else {
        load_matrices_transposed(b[j], moved(w + w_read, kProduct * w_part, 2 * j));
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
      uint32_t a[4];
      load_matrices(a, moved(x + x_read, 16 * i, 2 * x_part));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        multiply_add<Number>(sums[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // ---- the LoRA term ---------------------------------------------------------------------------

  // Two bf16 numbers, those that are not finite made so: 1 with the sign of an infinite one.
  FASTLORA_DEVICE static uint32_t finite(uint32_t pair) {
    // An exponent of ones carries into the sign's place; its highest bit goes.
    const uint32_t carry = (pair & 0x7f807f80u) + 0x00800080u;
    return pair & ~(carry >> 1 & 0x40004000u);
  }

  // Eight values, as bf16 numbers and what these leave out, to chunks `high` and `low`. An infinite
  // value lies in `low` alone: in `high`, too, it would meet lower parts of either sign.
  FASTLORA_DEVICE static void store_split(const float (&v)[8], uint32_t high, uint32_t low) {
    Words4 upper, lower;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      upper.w[i] = finite(pack<bf16>(v[2 * i], v[2 * i + 1]));
      lower.w[i] = pack<bf16>(v[2 * i] - as_float(upper.w[i] << 16),
                              v[2 * i + 1] - as_float(upper.w[i] & 0xffff0000u));
    }
    store_shared<Words4>(high, upper);
    store_shared<Words4>(low, lower);
  }

  // Ranks [rank0, + 32) of factor * S: chunks 0 to 3 of a row are the high parts, 4 to 7 the low.
  FASTLORA_DEVICE void store_S(int64_t rank0) const {
    constexpr int kSharers = kThreads / kTokens, kChunks = kRanks / 8 / kSharers;
    const int row = thread / kSharers, first = thread % kSharers * kChunks;
#pragma unroll 1
    for (int chunk = first; chunk < first + kChunks; chunk++) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int64_t rank = rank0 + chunk * 8 + i;
        const bool inside = row < tokens && rank < p.op.R;
        v[i] = inside ? p.op.factor * p.op.S[(token0 + row) * p.op.R + rank] : 0.0f;
      }
      store_split(v, x_tile(0) + swizzled(row, chunk), x_tile(0) + swizzled(row, 4 + chunk));
    }
  }

  // The same ranks of B, beside each other in a row, or of A, one below the other.
  FASTLORA_DEVICE void store_adapter(int64_t rank0) const {
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      float v[8];
      if constexpr (kForward) {
        const int row = thread / 2, chunk = thread % 2 * 2 + half;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int64_t rank = rank0 + chunk * 8 + i, n = output0 + row;
          const bool inside = n < p.outputs && rank < p.op.R;
          v[i] = inside ? load(p.op.adapter, p.op.adapter_dtype, n * p.op.R + rank) : 0.0f;
        }
        store_split(v, w_tile(0) + swizzled(row, chunk), w_tile(0) + swizzled(row, 4 + chunk));
      } else {
        const int row = thread / 8, chunk = thread % 8;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int64_t rank = rank0 + row, k = output0 + half * kStep + chunk * 8 + i;
          const bool inside = k < p.outputs && rank < p.op.R;
          v[i] = inside ? load(p.op.adapter, p.op.adapter_dtype, rank * p.outputs + k) : 0.0f;
        }
        const uint32_t at = w_tile(0) + static_cast<uint32_t>(half) * kHalfBytes;
        store_split(v, at + swizzled(row, chunk), at + swizzled(kRanks + row, chunk));
      }
    }
  }

  FASTLORA_DEVICE void add_lora_term() {
    constexpr int kLow = kRanks / kProduct;  // the low parts follow the high ones
#pragma unroll 1
    for (int64_t rank0 = 0; rank0 < p.op.R; rank0 += kRanks) {
      store_S(rank0);
      store_adapter(rank0);
      block_barrier();
#pragma unroll 1
      for (int part = 0; part < kLow && rank0 + part * kProduct < p.op.R; part++) {
        multiply_part<bf16>(x_tile(0), part, w_tile(0), part);
        multiply_part<bf16>(x_tile(0), kLow + part, w_tile(0), part);
        multiply_part<bf16>(x_tile(0), part, w_tile(0), kLow + part);
      }
      block_barrier();
    }
  }

  // dx: the mask touches the LoRA term alone. Sixteen lanes make the bits of one token's 128 outputs
  // and vote on them: word w of a token has pair i of outputs 32 w + 2 i in bits i and 16 + i.
  FASTLORA_DEVICE void drop_out() {
#pragma unroll 1
    for (int row = warp * 2; row < kTokens; row += kThreads / kWarp * 2) {
      const int token = token0 + row + lane / 16;
      const Words4 random = random_words(token, output0 / kDropoutBlock, lane % 16, p.op.dropout);
      Words4 keep;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t even = ballot(keeps_even(random.w[i], p.op.dropout));
        const uint32_t odd = ballot(keeps_odd(random.w[i], p.op.dropout));
        keep.w[i] = permute(even, odd, lane < 16 ? 0x5410 : 0x7632);
      }
      if (lane % 16 == 0) store_shared<Words4>(keep_word(row + lane / 16, 0), keep);
    }
    block_barrier();
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = warp_token + 16 * i + 8 * h + lane / 4;
        const uint32_t keep = load_shared<uint32_t>(keep_word(row, warp_output / 32));
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int pair = 4 * j + lane % 4;
          float& first = sums[i][j][2 * h];
          float& second = sums[i][j][2 * h + 1];
          first = keep >> pair & 1 ? first * p.op.dropout.scale : 0.0f;
          second = keep >> (16 + pair) & 1 ? second * p.op.dropout.scale : 0.0f;
        }
      }
    }
  }
  FASTLORA_DEVICE uint32_t keep_word(int row, int word) const {
    return shared + Memory::kKeepAt + static_cast<uint32_t>(4 * row + word) * 4;
  }

  // ---- the result ------------------------------------------------------------------------------

  FASTLORA_DEVICE void store_pair(int split, int64_t at, bool both, float first,
                                  float second) const {
    if (p.partial != nullptr || p.op.y_dtype == DType::f32) {
      float* y = p.partial == nullptr ? static_cast<float*>(p.op.y)
                                      : p.partial + split * p.op.M * p.outputs;
      y[at] = first;
      if (both) y[at + 1] = second;
      return;
    }
    const uint32_t word =
        p.op.y_dtype == DType::bf16 ? pack<bf16>(first, second) : pack<f16>(first, second);
    uint16_t* y = static_cast<uint16_t*>(p.op.y);
    if (p.outputs % 2 == 0) {
      *reinterpret_cast<uint32_t*>(y + at) = word;
    } else {
      y[at] = static_cast<uint16_t>(word);
      if (both) y[at + 1] = static_cast<uint16_t>(word >> 16);
    }
  }

  FASTLORA_DEVICE void store_sums() const {
    // Found out again: kept through the sum, it would cost the loop registers.
    const At at(p);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int64_t output = at.output0 + at.warp_output + 8 * j + at.lane % 4 * 2;
      if (output >= p.outputs) continue;
      const bool both = output + 1 < p.outputs;
      float bias[2] = {};
      if (p.op.bias != nullptr && p.partial == nullptr) {
        bias[0] = load(p.op.bias, p.op.bias_dtype, output);
        if (both) bias[1] = load(p.op.bias, p.op.bias_dtype, output + 1);
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int row = at.warp_token + 16 * i + 8 * h + at.lane / 4;
          if (row >= at.tokens) continue;
          store_pair(at.split, (at.token0 + row) * p.outputs + output, both,
                     sums[i][j][2 * h] + bias[0], sums[i][j][2 * h + 1] + bias[1]);
        }
      }
    }
  }

  // ---- all of it -------------------------------------------------------------------------------

  FASTLORA_DEVICE void run() {
    copy_tables(shared + Memory::kTablesAt, p.op.weight.quant, thread, kThreads);
    load_x(begin);
    const Scales first = load_codes(begin);
    Scales next = load_codes(begin + 1);
    copy_async_commit();
    block_barrier();
    if (split == 0) {
      add_lora_term();
      if (!kForward && p.op.dropout.threshold > 0) drop_out();
    }

    copy_async_wait<0>();
    {
      auto decoder = decoder_of(begin, first);
#pragma unroll
      for (int i = 0; i < 4; i++) decode_quarter(begin, i, decoder);
    }
#pragma unroll 1
    for (int step = begin; step < end; step++) {
      copy_async_wait<0>();
      // Step's x and decoded W are there; what the step before has read may be overwritten.
      block_barrier();
      if (step + 1 < end) load_x(step + 1);
      auto decoder = decoder_of(step + 1, next);
      // A thread decodes the codes that it has copied itself.
      next = load_codes(step + 2);
      copy_async_commit();
#pragma unroll
      for (int part = 0; part < kStep / kProduct; part++) {
        decode_quarter(step + 1, part, decoder);
        multiply_part<T>(x_tile(step + 1), part, w_tile(step), part);
      }
    }
    // Copies of codes past the end are under way: the next block may get this shared memory.
    copy_async_wait<0>();
    store_sums();
  }
};

// Blocks that share a multiprocessor: two where their shared memory and registers fit. The host's pass
// has the larger number, and asks blocks_at_once().
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200)
template <class Codes, int kTokens>
constexpr int kBlocksAtOnce = 1;
#else
template <class Codes, int kTokens>
constexpr int kBlocksAtOnce = kTokens == kFewTokens || Codes::kFewRegisters ? 2 : 1;
#endif

template <template <class, bool> class Codes, class T, bool kForward, int kTokens>
__global__ void __launch_bounds__(kThreads, (kBlocksAtOnce<Codes<T, kForward>, kTokens>))
    qlora_gemm(const GemmParams p) {
  Gemm<T, Codes<T, kForward>, kForward, kTokens>(p).run();
}

// The sum's parts: enough for every place that a multiprocessor has for a block, and no part under
// eight steps.
template <class Codes, bool kForward, int kTokens>
int gemm_splits(int64_t M, int64_t outputs, int64_t inputs) {
  const int64_t blocks = ceil_div(M, kTokens) * ceil_div(outputs, kOutputs);
  constexpr int64_t kLeastSteps = 8;
  const int64_t most = ceil_div(inputs, kStep) / kLeastSteps;
  const int64_t places =
      multiprocessors() *
      blocks_at_once(Layout<Codes, kForward, kTokens>::kBytes, kBlocksAtOnce<Codes, kTokens>);
  const int64_t wanted = places / larger<int64_t>(blocks, 1);
  return static_cast<int>(larger<int64_t>(1, smaller(most, wanted)));
}

template <template <class, bool> class Codes, bool kForward, int kTokens>
int64_t tiles_workspace(int64_t M, int64_t outputs, int64_t inputs) {
  const int64_t splits = gemm_splits<Codes<bf16, kForward>, kForward, kTokens>(M, outputs, inputs);
  return splits == 1 ? 0 : splits * M * outputs;
}

template <template <class, bool> class Codes, bool kForward>
int64_t gemm_workspace(int64_t M, int64_t outputs, int64_t inputs) {
  return M <= kFewTokens ? tiles_workspace<Codes, kForward, kFewTokens>(M, outputs, inputs)
                         : tiles_workspace<Codes, kForward, kMostTokens>(M, outputs, inputs);
}

template <template <class, bool> class Codes, class T, bool kForward, int kTokens>
const char* run_tiles(const QloraGemm& op, float* workspace, Stream stream) {
  if (op.M == 0) return nullptr;
  GemmParams p{};
  p.op = op;
  p.outputs = kForward ? op.weight.N : op.weight.K;
  p.inputs = static_cast<int>(kForward ? op.weight.K : op.weight.N);
  p.token_tiles = static_cast<int>(ceil_div(op.M, kTokens));
  p.steps = static_cast<int>(ceil_div(p.inputs, kStep));
  p.splits = gemm_splits<Codes<T, kForward>, kForward, kTokens>(op.M, p.outputs, p.inputs);
  if (p.splits > 1) p.partial = workspace;
  const int64_t blocks = ceil_div(p.outputs, kOutputs) * p.token_tiles * p.splits;
  constexpr size_t kShared = Layout<Codes<T, kForward>, kForward, kTokens>::kBytes;
  const char* error =
      launch(qlora_gemm<Codes, T, kForward, kTokens>, blocks, kThreads, kShared, stream, p);
  if (error != nullptr || p.splits == 1) return error;
  FinishParams end{};
  end.M = op.M;
  end.outputs = p.outputs;
  end.splits = p.splits;
  end.partial = p.partial;
  end.bias_dtype = op.bias_dtype;
  end.bias = op.bias;
  end.y_dtype = op.y_dtype;
  end.y = op.y;
  return finish(end, stream);
}

template <template <class, bool> class Codes, bool kForward>
const char* run_gemm(const QloraGemm& op, float* workspace, Stream stream) {
  const bool few = op.M <= kFewTokens;
  if (op.weight.compute_dtype == DType::bf16) {
    return few ? run_tiles<Codes, bf16, kForward, kFewTokens>(op, workspace, stream)
               : run_tiles<Codes, bf16, kForward, kMostTokens>(op, workspace, stream);
  }
  return few ? run_tiles<Codes, f16, kForward, kFewTokens>(op, workspace, stream)
             : run_tiles<Codes, f16, kForward, kMostTokens>(op, workspace, stream);
}

// Where K is no multiple of kRun: units of their own, for they compile as long as the others.
int64_t qlora_gemm_ragged_fwd_workspace(int64_t M, int64_t N, int64_t K);
const char* qlora_gemm_ragged_fwd(const QloraGemm& p, float* workspace, Stream stream);
int64_t qlora_gemm_ragged_dx_workspace(int64_t M, int64_t N, int64_t K);
const char* qlora_gemm_ragged_dx(const QloraGemm& p, float* workspace, Stream stream);

}  // namespace fastlora::cuda
