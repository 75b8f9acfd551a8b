// y = x W^T + scaling * S B^T + bias and S = drop(x) A^T for few tokens, W in 4 bits.
//
// Time goes into reading W, so its bytes go from memory to the tensor cores with nothing between but a
// look-up: W is the operand of 16 rows, tokens are the 8 columns. An mma sums over 16 terms whose
// order is free as long as both operands agree on it: so lane t of a row takes 16 neighbouring codes of
// each 64, eight bytes as they lie, and the same 16 elements of x.
//
// A byte's pair of codes is looked up as two 16-bit numbers in a table of 256, of which each lane has a
// copy in a bank of its own. absmax multiplies the sum over 64 codes in fp32: they share one.
//
// Blocks share out W's rows and parts of its columns; further blocks make parts of S meanwhile, in
// fp32. finish.cu adds the parts and the LoRA term.
#include "cuda/dropout.cuh"
#include "cuda/finish.cuh"
#include "cuda/launch.cuh"
#include "cuda/parts.cuh"
#include "cuda/weights.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kRows = 16;                                      // of W, for a block
constexpr int kLog2Columns = 6, kColumns = 1 << kLog2Columns;  // of W: a group has one absmax
// Such groups of columns that a warp loads at once: as many as the registers hold.
template <int kTokenTiles>
constexpr int kAtOnce = kTokenTiles > 2 ? 1 : 4;
constexpr int kTile = 8;          // tokens of an mma, and of a block that makes S
constexpr int kRanks = 4;         // of a block that makes S: with kTile tokens, a sum for each lane
constexpr int kMostTiles = 4;     // of tokens, for a block that reads W
constexpr int kPairs = 256;       // values of a byte
constexpr int kBlocksAtOnce = 2;  // on a multiprocessor

constexpr uint32_t kPairBytes = kWarp * sizeof(uint32_t);  // a pair, once for each lane
constexpr uint32_t kTableAt = kPairs * kPairBytes;
constexpr uint32_t kSharedBytes = kTableAt + kTableBytes;

struct DecodeParams {
  LoraLinearFwd op;
  int row_tiles, splits;  // of W and of the sum over its columns
  int token_groups;       // the tokens of a block that reads W
  int token_tiles, rank_tiles, S_splits;
  float* partial;    // [splits, M, N]
  float* S_partial;  // [S_splits, M, R]
};

// ---- x W^T -------------------------------------------------------------------------------------

// Fills the table: entry e has the numbers of e's high and low nibble, 32 times.
template <class T>
FASTLORA_DEVICE void fill_pairs(uint32_t shared, const Quant4bit& quant) {
  const int entry = thread_index();
  static_assert(kThreads == kPairs);
  const uint32_t pair = pack<T>(quant.code[entry / 16], quant.code[entry % 16]);
#pragma unroll 4
  for (int i = 0; i < kWarp; i++) {
    // Each lane starts at another bank.
    const uint32_t copy = static_cast<uint32_t>((i + entry) % kWarp);
    store_shared<uint32_t>(shared + static_cast<uint32_t>(entry) * kPairBytes + 4 * copy, pair);
  }
}

// Row n of W: its codes and its absmax.
template <class T, int kTokenTiles>
FASTLORA_DEVICE void multiply_rows(const DecodeParams& p) {
  const uint32_t shared = shared_memory(), tables = shared + kTableAt;
  const int thread = thread_index(), lane = thread % kWarp, warp = thread / kWarp;
  const int g = lane / 4, t = lane % 4;
  // Blocks that run at the same time share W's rows: with many tokens, the second read of W is one
  // from the cache.
  const int split = block_index() / p.token_groups % p.splits;
  const int row0 = block_index() / (p.token_groups * p.splits) * kRows;
  const int64_t token0 = block_index() % p.token_groups * kTokenTiles * kTile;
  const LoraLinearFwd& op = p.op;
  const Quant4bit& quant = op.weight.quant;
  const int64_t N = op.weight.N, K = op.weight.K;
  fill_pairs<T>(shared, quant);
  copy_tables(tables, quant, thread, kThreads);
  block_barrier();

  // Rows and tokens past the end repeat the last one and are not stored. W is counted in groups.
  const int groups = static_cast<int>(K / kColumns), row = smaller<int>(row0 + g, N - 1);
  const uint32_t first = static_cast<uint32_t>(row) * static_cast<uint32_t>(groups);
  const uint32_t below = static_cast<uint32_t>((smaller<int>(row0 + g + 8, N - 1) - row) * groups);
  const uint8_t* packed = quant.packed + 8 * t;
  const float offset = quant.nested_absmax == nullptr ? 0.0f : absmax_offset(tables);
  const uint32_t pairs = shared + 4 * static_cast<uint32_t>(lane);
  const auto look_up = [&](uint32_t word, int byte) {
    const uint32_t value = permute(word, 0, 0x4440u + static_cast<uint32_t>(byte));
    return load_shared<uint32_t>(pairs + value * kPairBytes);
  };

  constexpr int kLoads = kAtOnce<kTokenTiles>;
  float sums[kTokenTiles][4] = {};
  const int end = part_start(groups, split + 1, p.splits);
  for (int group0 = part_start(groups, split, p.splits) + warp * kLoads; group0 < end;
       group0 += kWarps * kLoads) {
    Words2 codes[kLoads][2];
    Absmax scales[kLoads][2];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const uint32_t group = first + static_cast<uint32_t>(smaller(group0 + i, end - 1));
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint32_t at = group + static_cast<uint32_t>(h) * below;
        codes[i][h] =
            load_once(reinterpret_cast<const Words2*>(packed + at * int64_t{kColumns / 2}));
        scales[i][h] = load_piece_absmax(quant, at, kLog2Columns);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      if (group0 + i >= end) break;
      const int64_t k = (group0 + i) * int64_t{kColumns} + 16 * t;
      uint32_t w[2][8];
#pragma unroll
      for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) w[h][j] = look_up(codes[i][h].w[j / 4], j % 4);
      }
      const float scale0 = absmax_value(quant, scales[i][0], tables, offset);
      const float scale1 = absmax_value(quant, scales[i][1], tables, offset);
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; tile++) {
        const int64_t token = smaller<int64_t>(token0 + tile * kTile + g, op.M - 1);
        const auto* tokens =
            reinterpret_cast<const Words4*>(static_cast<const T*>(op.x) + token * op.ldx + k);
        const Words4 low = tokens[0], high = tokens[1];
        float sum[4] = {};
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          const uint32_t a[4] = {w[0][j], w[1][j], w[0][j + 1], w[1][j + 1]};
          const Words4& b = j < 4 ? low : high;
          multiply_add<T>(sum, a, b.w[j % 4], b.w[j % 4 + 1]);
        }
        sums[tile][0] += scale0 * sum[0];
        sums[tile][1] += scale0 * sum[1];
        sums[tile][2] += scale1 * sum[2];
        sums[tile][3] += scale1 * sum[3];
      }
    }
  }

  // The warps' sums meet where the table was: [warp][token][row], the rows of a token kStride apart,
  // so that no two of the sums that a warp stores at once meet in a bank.
  constexpr int kTokens = kTokenTiles * kTile, kStride = kRows + 4;
  static_assert(kWarps * kTokens * kStride * sizeof(float) <= kSharedBytes);
  block_barrier();
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; tile++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = g + 8 * (i / 2), token = tile * kTile + 2 * t + i % 2;
      const int at = (warp * kTokens + token) * kStride + row;
      store_shared<float>(shared + 4 * static_cast<uint32_t>(at), sums[tile][i]);
    }
  }
  block_barrier();
  for (int i = thread; i < kRows * kTokens; i += kThreads) {
    const int row = i % kRows, token = i / kRows;
    if (row0 + row >= N || token0 + token >= op.M) continue;
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < kWarps; other++) {
      const int at = (other * kTokens + token) * kStride + row;
      sum += load_shared<float>(shared + 4 * static_cast<uint32_t>(at));
    }
    p.partial[(split * op.M + token0 + token) * N + row0 + row] = sum;
  }
}

// ---- S -----------------------------------------------------------------------------------------

// A part of S for eight tokens and four ranks. A thread has the elements of x that one Philox counter
// decides on: four pairs, 32 apart, of a block of 128.
template <class T>
FASTLORA_DEVICE void make_S(const DecodeParams& p, int block) {
  constexpr int kLanes = 16, kBlocksAtOnce = kThreads / kLanes;
  const uint32_t shared = shared_memory();
  const int thread = thread_index(), lane = thread % kWarp;
  const LoraLinearFwd& op = p.op;
  const int64_t K = op.weight.K;
  const int split = block % p.S_splits, tile = block / p.S_splits;
  const int64_t token0 = tile % p.token_tiles * kTile, rank0 = tile / p.token_tiles * kRanks;
  const int blocks = static_cast<int>(ceil_div(K, kDropoutBlock));
  const int end = part_start(blocks, split + 1, p.S_splits);
  static_assert(kTile * kRanks == kWarp);
  float sums[kWarp] = {};  // [token][rank]
#pragma unroll 1
  for (int b = part_start(blocks, split, p.S_splits) + thread / kLanes; b < end;
       b += kBlocksAtOnce) {
    const int64_t first = int64_t{b} * kDropoutBlock + 2 * (thread % kLanes);
    uint32_t keep[kTile];
#pragma unroll
    for (int m = 0; m < kTile; m++) {
      keep[m] = op.dropout.threshold == 0 ? 0xff : 0;
      if (op.dropout.threshold == 0) continue;
      const Words4 random = random_words(token0 + m, b, thread % kLanes, op.dropout);
#pragma unroll
      for (int w = 0; w < 4; w++) {
        keep[m] |= static_cast<uint32_t>(keeps_even(random.w[w], op.dropout)) << (2 * w);
        keep[m] |= static_cast<uint32_t>(keeps_odd(random.w[w], op.dropout)) << (2 * w + 1);
      }
    }
#pragma unroll 1
    for (int w = 0; w < 4; w++) {
      const int64_t k = first + 32 * w;
      if (k >= K) break;
      float x[kTile][2];
#pragma unroll
      for (int m = 0; m < kTile; m++) {
        const int64_t token = smaller(token0 + m, op.M - 1);
        const T* source = static_cast<const T*>(op.x) + token * op.ldx + k;
        const uint32_t word = *reinterpret_cast<const uint32_t*>(source);
        x[m][0] = keep[m] >> (2 * w) & 1 ? to_float(T{static_cast<uint16_t>(word)}) : 0.0f;
        x[m][1] =
            keep[m] >> (2 * w + 1) & 1 ? to_float(T{static_cast<uint16_t>(word >> 16)}) : 0.0f;
      }
#pragma unroll
      for (int r = 0; r < kRanks; r++) {
        const int64_t rank = smaller(rank0 + r, op.R - 1);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float a = load(op.lora_A, op.adapter_dtype, rank * K + k + i);
#pragma unroll
          for (int m = 0; m < kTile; m++) sums[m * kRanks + r] += x[m][i] * a;
        }
      }
    }
  }
  // The lanes' sums: with each exchange a lane gives away half of what it has, until only the
  // complete sum number `lane` is left.
#pragma unroll
  for (int exchange = 0; exchange < 5; exchange++) {
    const int apart = kWarp / 2 >> exchange;
#pragma unroll
    for (int i = 0; i < kWarp / 2; i++) {
      if (i >= apart) continue;
      const bool upper = (lane & apart) != 0;
      const float given = upper ? sums[i] : sums[i + apart];
      sums[i] = (upper ? sums[i + apart] : sums[i]) + shuffle_xor(given, apart);
    }
  }
  store_shared<float>(shared + 4 * static_cast<uint32_t>(thread), sums[0]);
  block_barrier();
  const int64_t token = token0 + thread / kRanks, rank = rank0 + thread % kRanks;
  if (thread >= kWarp || token >= op.M || rank >= op.R) return;
  float sum = 0.0f;
  for (int other = 0; other < kWarps; other++) {
    sum += load_shared<float>(shared + 4 * static_cast<uint32_t>(other * kWarp + thread));
  }
  const float scale = op.dropout.threshold == 0 ? 1.0f : op.dropout.scale;
  p.S_partial[(split * op.M + token) * op.R + rank] = scale * sum;
}

// ---- both --------------------------------------------------------------------------------------

template <class T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) decode_kernel(const DecodeParams p) {
  const int S_block = block_index() - p.row_tiles * p.splits * p.token_groups;
  if (S_block < 0) {
    multiply_rows<T, kTokenTiles>(p);
  } else {
    make_S<T>(p, S_block);
  }
}

DecodeParams params_of(const LoraLinearFwd& op) {
  DecodeParams p{};
  p.op = op;
  p.row_tiles = static_cast<int>(ceil_div(op.weight.N, kRows));
  p.token_tiles = static_cast<int>(ceil_div(op.M, kTile));
  p.token_groups = static_cast<int>(ceil_div(p.token_tiles, kMostTiles));
  p.rank_tiles = static_cast<int>(ceil_div(op.R, kRanks));
  // A block for each place, but no warp without columns.
  const int places = multiprocessors() * blocks_at_once(kSharedBytes, kBlocksAtOnce);
  const int64_t wanted = ceil_div(places, p.row_tiles * p.token_groups);
  const int64_t most = larger<int64_t>(1, op.weight.K / (kColumns * kWarps));
  p.splits = static_cast<int>(smaller(wanted, most));
  constexpr int64_t kColumnsOfBlock = kThreads / 16 * kDropoutBlock;
  p.S_splits = static_cast<int>(ceil_div(op.weight.K, kColumnsOfBlock));
  return p;
}

template <class T>
const char* run(const DecodeParams& p, Stream stream) {
  const int64_t blocks = int64_t{p.row_tiles} * p.splits * p.token_groups +
                         int64_t{p.token_tiles} * p.rank_tiles * p.S_splits;
  const auto start = [&](auto kernel) {
    return launch(kernel, blocks, kThreads, kSharedBytes, stream, p);
  };
  if (p.token_tiles == 1) return start(decode_kernel<T, 1>);
  if (p.token_tiles == 2) return start(decode_kernel<T, 2>);
  return start(decode_kernel<T, kMostTiles>);
}

}  // namespace

int64_t qlora_decode_workspace(const LoraLinearFwd& op) {
  if (op.M == 0) return 0;
  const DecodeParams p = params_of(op);
  return op.M * (p.splits * op.weight.N + p.S_splits * op.R);
}

const char* qlora_decode(const LoraLinearFwd& op, float* workspace, Stream stream) {
  if (op.M == 0) return nullptr;
  DecodeParams p = params_of(op);
  p.partial = workspace;
  p.S_partial = workspace + p.splits * op.M * op.weight.N;
  const char* error =
      op.weight.compute_dtype == DType::bf16 ? run<bf16>(p, stream) : run<f16>(p, stream);
  if (error != nullptr) return error;
  FinishParams end{};
  end.M = op.M;
  end.outputs = op.weight.N;
  end.splits = p.splits;
  end.partial = p.partial;
  end.bias_dtype = op.bias_dtype;
  end.bias = op.bias;
  end.y_dtype = op.x_dtype;
  end.y = op.y;
  end.R = op.R;
  end.S_splits = p.S_splits;
  end.S_partial = p.S_partial;
  end.S = op.S;
  end.factor = op.scaling;
  end.adapter_dtype = op.adapter_dtype;
  end.adapter = op.lora_B;
  return finish(end, stream);
}

}  // namespace fastlora::cuda
