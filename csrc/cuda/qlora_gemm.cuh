// The tile kernel of qlora_gemm_fwd and qlora_gemm_dx (struct QloraGemm in kernels.h).
//
// A block makes a tile of 128 tokens by 128 outputs with eight warps of 64 x 32. Forward and dx differ
// in one point: the sum runs along W's rows or down its columns. Either way the packed bytes are
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

#include "cuda/dropout.cuh"
#include "cuda/finish.cuh"
#include "cuda/launch.cuh"
#include "cuda/parts.cuh"
#include "cuda/weights.cuh"

namespace fastlora::cuda {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kTokens = 128, kOutputs = 128;  // of a tile
constexpr int kStep = 64;                     // terms of the sum at once
constexpr int kProduct = 16;                  // terms of one tensor core instruction
constexpr int kRun = 32;                      // codes that a thread decodes: they share one absmax
constexpr int kRanks = 32;                    // ranks at once: high and low parts fill a step
constexpr int kWarpTokens = 64, kWarpOutputs = 32;

// Shared memory. A tile's rows have 128 bytes, eight chunks of 16.
constexpr uint32_t kRowBytes = 128, kChunkBytes = 16;
constexpr uint32_t kTileBytes = kTokens * kRowBytes;
constexpr uint32_t kHalfBytes = kStep * kRowBytes;  // dx: W's tile is two halves of 64 columns
constexpr uint32_t kPackedBytes = kThreads * kChunkBytes;
constexpr uint32_t kXAt = 0, kWAt = kXAt + 2 * kTileBytes, kPackedAt = kWAt + 2 * kTileBytes;
constexpr uint32_t kTablesAt = kPackedAt + 2 * kPackedBytes;
constexpr uint32_t kKeepAt = kTablesAt + kTableBytes;  // dx: four words for each token
constexpr uint32_t kGemmShared = kKeepAt, kGemmDxShared = kKeepAt + kTokens * sizeof(Words4);

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

template <class T, bool kForward>
struct Gemm {
  const GemmParams& p;
  const uint32_t shared = shared_memory();
  const int thread = thread_index(), lane = thread % kWarp, warp = thread / kWarp;
  const int warp_token = warp % 2 * kWarpTokens, warp_output = warp / 2 * kWarpOutputs;
  const int split = block_index() % p.splits, tile = block_index() / p.splits;
  // Blocks that run at the same time share W's columns.
  const int64_t token0 = int64_t{tile % p.token_tiles} * kTokens;
  const int output0 = tile / p.token_tiles * kOutputs;
  // The thread's run of codes in W's tile: a row, and the first of its four chunks.
  const int run_row = kForward ? thread / 2 : thread / 2 % kStep;
  const int run_half = kForward ? 0 : thread / (kThreads / 2);
  const int run_chunk = thread % 2 * 4;
  float sums[4][4][4] = {};  // [16 tokens][8 outputs][element of an mma's result]

  FASTLORA_DEVICE uint32_t x_tile(int i) const {
    return shared + kXAt + static_cast<uint32_t>(i & 1) * kTileBytes;
  }
  FASTLORA_DEVICE uint32_t w_tile(int i) const {
    return shared + kWAt + static_cast<uint32_t>(i & 1) * kTileBytes;
  }
  FASTLORA_DEVICE uint32_t packed(int i) const {
    return shared + kPackedAt + static_cast<uint32_t>(i & 1) * kPackedBytes +
           static_cast<uint32_t>(thread) * kChunkBytes;
  }

  // ---- loads -----------------------------------------------------------------------------------

  FASTLORA_DEVICE void load_x(int step) const {
    const int row = thread / 8, chunk = thread % 8, first = step * kStep + chunk * 8;
    const int left = p.inputs - first, count = smaller(larger(left, 0), 8);
    const int64_t token = token0 + row;
    const T* source = static_cast<const T*>(p.op.x) + token * p.op.ldx + first;
#pragma unroll
    for (int i = 0; i < kTokens * 8 / kThreads; i++) {
      const int down = i * (kThreads / 8);
      const bool inside = count > 0 && token + down < p.op.M;
      // Step i of the sum lies in tile i + 1: the LoRA term, before them, has tile 0.
      copy_async(x_tile(step + 1) + swizzled(row + down, chunk),
                 inside ? source + down * p.op.ldx : p.op.x, inside ? count * 2 : 0);
    }
  }

  // The thread's run in `step`: its first code, or -1 where that lies outside of W.
  FASTLORA_DEVICE int64_t run_start(int step) const {
    const int n = run_row + (kForward ? output0 : step * kStep);
    const int k = run_chunk * 8 + (kForward ? step * kStep : output0 + run_half * kStep);
    const bool inside = n < p.op.weight.N && k < p.op.weight.K;
    return inside ? n * p.op.weight.K + k : -1;
  }
  FASTLORA_DEVICE void load_packed(int step) const {
    const int64_t start = run_start(step);
    copy_async(packed(step), p.op.weight.quant.packed + (start < 0 ? 0 : start / 2),
               start < 0 ? 0 : kRun / 2);
  }
  FASTLORA_DEVICE Absmax load_scale(int step) const {
    const int64_t start = run_start(step);
    return start < 0 ? Absmax{0.0f, 0} : load_absmax(p.op.weight.quant, start);
  }

  // ---- decoding --------------------------------------------------------------------------------

  // A quarter of the thread's run, eight codes, to W's tile.
  FASTLORA_DEVICE void decode_quarter(int step, int quarter, uint32_t codes,
                                      const Planes& planes) const {
    const uint32_t half = static_cast<uint32_t>(run_half) * kHalfBytes;
    store_shared<Words4>(w_tile(step) + half + swizzled(run_row, run_chunk + quarter),
                         decode(codes, planes));
  }

  // ---- products --------------------------------------------------------------------------------

  // Adds terms [16 x_part, + 16) of x's tile times terms [16 w_part, + 16) of W's.
  template <class Number>
  FASTLORA_DEVICE void multiply_part(uint32_t x, int x_part, uint32_t w, int w_part) {
    uint32_t a[4][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = warp_token + 16 * i + lane % 16, chunk = 2 * x_part + lane / 16;
      load_matrices(a[i], x + swizzled(row, chunk));
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int output = warp_output + 16 * j;
      if constexpr (kForward) {
        const int row = output + lane / 16 * 8 + lane % 8, chunk = 2 * w_part + lane / 8 % 2;
        load_matrices(b[j], w + swizzled(row, chunk));
      } else {
        const int row = kProduct * w_part + lane % 16, column = output + lane / 16 * 8;
        const uint32_t half = static_cast<uint32_t>(column / kStep) * kHalfBytes;
        load_matrices_transposed(b[j], w + half + swizzled(row, column % kStep / 8));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        multiply_add<Number>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // ---- the LoRA term ---------------------------------------------------------------------------

  // Eight values, as bf16 numbers and what these leave out, to chunks `high` and `low`.
  FASTLORA_DEVICE static void store_split(const float (&v)[8], uint32_t high, uint32_t low) {
    Words4 upper, lower;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      upper.w[i] = pack<bf16>(v[2 * i], v[2 * i + 1]);
      lower.w[i] = pack<bf16>(v[2 * i] - as_float(upper.w[i] << 16),
                              v[2 * i + 1] - as_float(upper.w[i] & 0xffff0000u));
    }
    store_shared<Words4>(high, upper);
    store_shared<Words4>(low, lower);
  }

  // Ranks [rank0, + 32) of factor * S: chunks 0 to 3 of a row are the high parts, 4 to 7 the low.
  FASTLORA_DEVICE void store_S(int64_t rank0) const {
    const int row = thread / 2;
    const int64_t token = token0 + row;
#pragma unroll 1
    for (int chunk = thread % 2 * 2; chunk < thread % 2 * 2 + 2; chunk++) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int64_t rank = rank0 + chunk * 8 + i;
        const bool inside = token < p.op.M && rank < p.op.R;
        v[i] = inside ? p.op.factor * p.op.S[token * p.op.R + rank] : 0.0f;
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
      const int64_t token = token0 + row + lane / 16;
      const Words4 random =
          random_words(token, output0 / kDropoutBlock, lane % 16, p.op.dropout);
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
    for (int i = 0; i < 4; i++) {
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
    return shared + kKeepAt + static_cast<uint32_t>(4 * row + word) * 4;
  }

  // ---- the result ------------------------------------------------------------------------------

  FASTLORA_DEVICE void store_pair(int64_t at, bool both, float first, float second) const {
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
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int64_t output = output0 + warp_output + 8 * j + lane % 4 * 2;
      if (output >= p.outputs) continue;
      const bool both = output + 1 < p.outputs;
      float bias[2] = {};
      if (p.op.bias != nullptr && p.partial == nullptr) {
        bias[0] = load(p.op.bias, p.op.bias_dtype, output);
        if (both) bias[1] = load(p.op.bias, p.op.bias_dtype, output + 1);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int64_t token = token0 + warp_token + 16 * i + 8 * h + lane / 4;
          if (token >= p.op.M) continue;
          store_pair(token * p.outputs + output, both, sums[i][j][2 * h] + bias[0],
                     sums[i][j][2 * h + 1] + bias[1]);
        }
      }
    }
  }

  // ---- all of it -------------------------------------------------------------------------------

  FASTLORA_DEVICE void run() {
    const int begin = part_start(p.steps, split, p.splits);
    const int end = part_start(p.steps, split + 1, p.splits);
    const uint32_t tables = shared + kTablesAt;
    copy_tables(tables, p.op.weight.quant, thread, kThreads);
    load_x(begin);
    load_packed(begin);
    load_packed(begin + 1);
    copy_async_commit();
    const Absmax first = load_scale(begin);
    Absmax next = load_scale(begin + 1);
    block_barrier();
    if (split == 0) {
      add_lora_term();
      if (!kForward && p.op.dropout.threshold > 0) drop_out();
    }

    copy_async_wait<0>();
    {
      const Planes planes = make_planes<T>(tables, absmax_value(p.op.weight.quant, first, tables));
      const Words4 codes = load_shared<Words4>(packed(begin));
#pragma unroll
      for (int i = 0; i < 4; i++) decode_quarter(begin, i, codes.w[i], planes);
    }
#pragma unroll 1
    for (int step = begin; step < end; step++) {
      copy_async_wait<0>();
      // Step's x and decoded W are there; what the step before has read may be overwritten.
      block_barrier();
      if (step + 1 < end) load_x(step + 1);
      // A thread decodes the codes that it has copied itself.
      load_packed(step + 2);
      copy_async_commit();
      const Planes planes = make_planes<T>(tables, absmax_value(p.op.weight.quant, next, tables));
      const Words4 codes = load_shared<Words4>(packed(step + 1));
      next = load_scale(step + 2);
#pragma unroll
      for (int part = 0; part < kStep / kProduct; part++) {
        decode_quarter(step + 1, part, codes.w[part], planes);
        multiply_part<T>(x_tile(step + 1), part, w_tile(step), part);
      }
    }
    store_sums();
  }
};

template <class T, bool kForward>
__global__ void __launch_bounds__(kThreads, 2) qlora_gemm(const GemmParams p) {
  Gemm<T, kForward>{p}.run();
}

// Parts of the sum: enough for a block on every multiprocessor, and no part under eight steps.
inline int gemm_splits(int64_t M, int64_t outputs, int64_t inputs) {
  const int64_t blocks = ceil_div(M, kTokens) * ceil_div(outputs, kOutputs);
  constexpr int64_t kLeastSteps = 8;
  const int64_t most = ceil_div(inputs, kStep) / kLeastSteps;
  const int64_t wanted = multiprocessors() / larger<int64_t>(blocks, 1);
  return static_cast<int>(larger<int64_t>(1, smaller(most, wanted)));
}

template <bool kForward>
const char* run_qlora_gemm(const QloraGemm& op, float* workspace, Stream stream) {
  if (op.M == 0) return nullptr;
  GemmParams p{};
  p.op = op;
  p.outputs = kForward ? op.weight.N : op.weight.K;
  p.inputs = static_cast<int>(kForward ? op.weight.K : op.weight.N);
  p.token_tiles = static_cast<int>(ceil_div(op.M, kTokens));
  p.steps = static_cast<int>(ceil_div(p.inputs, kStep));
  p.splits = gemm_splits(op.M, p.outputs, p.inputs);
  if (p.splits > 1) p.partial = workspace;
  const int64_t blocks = ceil_div(p.outputs, kOutputs) * p.token_tiles * p.splits;
  const size_t shared = kForward ? kGemmShared : kGemmDxShared;
  const char* error =
      op.weight.compute_dtype == DType::bf16
          ? launch(qlora_gemm<bf16, kForward>, blocks, kThreads, shared, stream, p)
          : launch(qlora_gemm<f16, kForward>, blocks, kThreads, shared, stream, p);
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

}  // namespace fastlora::cuda
