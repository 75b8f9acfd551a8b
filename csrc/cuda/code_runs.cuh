// What a thread of qlora_gemm decodes of W in a step of the sum: a run of 32 neighbouring codes of a
// row, through shared memory of its own. Forward goes 64 columns further in each step, dx 64 rows.
//
//     Codes(weight, row, column, step)     the run in that step; the row may lie past W's last one
//     load(step, to)                       starts the copy of its bytes; its scales, not yet decoded
//     decoder(step, from, scales, tables)  whose quarter(i), i in order, are eight numbers each
//
// AlignedCodes are those of a W whose rows are whole runs: 16 bytes that lie so, with one absmax.
// RaggedCodes are those of any W. Blocks of bitsandbytes' format run on from row to row, so a run may
// start at either half of any byte, and at one place in it the absmax may change.
#pragma once

#include "cuda/parts.cuh"
#include "cuda/weights.cuh"

namespace fastlora::cuda {

constexpr int kRun = 32;   // no longer than a block
constexpr int kStep = 64;  // of the sum: columns or rows from one run to the next

// Past the end W is times zero, and a scale that is not finite would make NaN of it. There the
// forward takes zero. dx, which has no register for that, stays in the last of the thread's rows:
// where the scale there is not finite, the outputs that it meets aren't anyway.
template <class T, bool kForward>
class AlignedCodes {
 public:
  static constexpr uint32_t kBytes = kRun / 2;
  static constexpr bool kFewRegisters = true;  // two blocks with a large tile have enough
  using Scales = Absmax;

  class Decoder {
   public:
    FASTLORA_DEVICE Decoder(uint32_t from, const Planes& planes) : planes_(planes), from_(from) {}

    FASTLORA_DEVICE Words4 quarter(int i) {
      // Lanes 8 apart meet in a bank. To begin with the other half in every other eight lanes takes
      // 2 to 10 instructions a step, and registers that sm_90a and sm_100 have to spill for.
      if (i % 2 == 0) codes_ = load_shared<Words2>(from_ + 4 * static_cast<uint32_t>(i));
      return decode(codes_.w[i % 2], planes_);
    }

   private:
    const Planes planes_;
    const uint32_t from_;
    Words2 codes_;
  };

  FASTLORA_DEVICE AlignedCodes(const Weight& weight, int row, int column, int step)
      : weight_(weight) {
    const int N = static_cast<int>(weight.N), K = static_cast<int>(weight.K);
    const int left = kForward ? K - column : N - row;
    if (kForward ? row < N : column < K) steps_ = (left + kStep - 1) / kStep;
    first_ = kForward ? row * weight.K + step * kStep + column
                      : smaller(step * kStep + row, N - 1) * weight.K +
                            smaller<int64_t>(column, K - kRun);
  }

  FASTLORA_DEVICE Scales load(int step, uint32_t to) {
    const Quant4bit& quant = weight_.quant;
    const bool inside = step < steps_;
    copy_async(to, quant.packed + (first_ >> 1), inside ? kRun / 2 : 0);
    Absmax absmax = load_absmax(quant, inside || !kForward ? first_ : 0);
    if (kForward && !inside) absmax.scale = 0.0f;
    if (kForward || step + 1 < steps_) first_ += kForward ? kStep : kStep * weight_.K;
    return absmax;
  }

  FASTLORA_DEVICE Decoder decoder(int, uint32_t from, const Scales& scales, uint32_t tables) const {
    return Decoder(from, make_planes<T>(tables, absmax_value(weight_.quant, scales, tables)));
  }

 private:
  const Weight& weight_;
  int steps_ = 0;  // in which the run lies inside of W
  int64_t first_;  // code of the run that is loaded next
};

// The words that hold a run are copied one by one, are shifted to begin with its first code, and are
// decoded with either scale. Codes past the row's end have one of the row's own scales, runs past W's
// end have zero.
template <class T, bool kForward>
class RaggedCodes {
 public:
  static constexpr int kCodesOfWord = 8;
  static constexpr int kWords = kRun / kCodesOfWord + 1;
  static constexpr uint32_t kBytes = kWords * sizeof(uint32_t);
  static constexpr bool kFewRegisters = false;
  struct Scales {
    Absmax first, second;
  };

  class Decoder {
   public:
    // Code `change` of the run and those behind it have the second scale.
    FASTLORA_DEVICE Decoder(uint32_t from, int bits, int change, const Planes& first,
                            const Planes& second)
        : first_(first), second_(second), from_(from), bits_(bits), change_(change) {
      word_ = swapped(load_shared<uint32_t>(from));
    }

    FASTLORA_DEVICE Words4 quarter(int i) {
      const uint32_t next =
          swapped(load_shared<uint32_t>(from_ + 4 * static_cast<uint32_t>(i + 1)));
      const uint32_t codes = swapped(shift_left(word_, next, bits_));
      word_ = next;
      Words4 out = decode(codes, first_);
      const Words4 other = decode(codes, second_);
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const uint32_t behind = from_code(change_ - (kCodesOfWord * i + 2 * w));
        out.w[w] = (out.w[w] & ~behind) | (other.w[w] & behind);
      }
      return out;
    }

   private:
    // Bytes in the order of codes: the first one's highest.
    FASTLORA_DEVICE static uint32_t swapped(uint32_t word) { return permute(word, 0, 0x0123); }
    // The bits of element `first` of a pair, and of what follows it.
    FASTLORA_DEVICE static uint32_t from_code(int first) {
      return first <= 0 ? 0xffffffffu : first == 1 ? 0xffff0000u : 0;
    }

    const Planes first_, second_;
    const uint32_t from_;
    const int bits_, change_;
    uint32_t word_;
  };

  FASTLORA_DEVICE RaggedCodes(const Weight& weight, int row, int column, int)
      : weight_(weight), row_(row), column_(column) {}

  FASTLORA_DEVICE Scales load(int step, uint32_t to) const {
    const Quant4bit& quant = weight_.quant;
    const Run run = run_of(step);
    const int64_t bytes = (weight_.N * weight_.K + 1) / 2;
    int64_t byte = run.first / kCodesOfWord * sizeof(uint32_t);
#pragma unroll
    for (uint32_t i = 0; i < kBytes; i += sizeof(uint32_t)) {
      const int64_t left = run.codes == 0 ? 0 : larger<int64_t>(bytes - byte, 0);
      const int most = static_cast<int>(sizeof(uint32_t));
      copy_async_word(to + i, quant.packed + byte, smaller<int64_t>(left, most));
      byte += most;
    }
    const int64_t last = run.first + larger(run.codes - 1, 0);
    Scales scales = {load_absmax(quant, run.first), load_absmax(quant, last)};
    if (run.codes == 0) scales.first.scale = scales.second.scale = 0.0f;
    return scales;
  }

  FASTLORA_DEVICE Decoder decoder(int step, uint32_t from, const Scales& scales,
                                  uint32_t tables) const {
    const Quant4bit& quant = weight_.quant;
    const Run run = run_of(step);
    const int blocksize = static_cast<int>(quant.blocksize);
    const int change = blocksize - static_cast<int>(run.first & (blocksize - 1));
    const int bits = 4 * static_cast<int>(run.first % kCodesOfWord);
    return Decoder(from, bits, change,
                   make_planes<T>(tables, absmax_value(quant, scales.first, tables)),
                   make_planes<T>(tables, absmax_value(quant, scales.second, tables)));
  }

 private:
  struct Run {
    int64_t first;  // its first code
    int codes;      // that lie in W and in the row
  };
  FASTLORA_DEVICE Run run_of(int step) const {
    const int64_t row = row_ + (kForward ? 0 : int64_t{step} * kStep);
    const int64_t column = column_ + (kForward ? int64_t{step} * kStep : 0);
    if (row >= weight_.N || column >= weight_.K) return {0, 0};
    return {row * weight_.K + column, static_cast<int>(smaller<int64_t>(weight_.K - column, kRun))};
  }

  const Weight& weight_;
  const int row_, column_;  // of the run in step 0
};

}  // namespace fastlora::cuda
