// The kernels of one instruction set, and the choice among the sets that were compiled.
#pragma once

#include "../../common/params.h"

namespace fastlora {

struct Kernels {
  const char* isa;
  // One layer, or `count` that read one x: with the same M, K, x, tiles and dtypes, all dense or all
  // 4-bit. The layers of a backward have one dx, the sum of what each adds to it.
  void (*lora_linear_fwd)(LoraLinearFwd* layers, int64_t count, const ParallelFor&);
  void (*lora_linear_bwd)(LoraLinearBwd* layers, int64_t count, const ParallelFor&);
  void (*lora_embedding_fwd)(const LoraEmbeddingFwd&, const ParallelFor&);
  void (*lora_embedding_bwd)(const LoraEmbeddingBwd&, const ParallelFor&);
  void (*quantize_4bit)(const Quantize4bit&, const ParallelFor&);
  void (*dequantize_4bit)(const Dequantize4bit&, const ParallelFor&);
  void (*dora_norm)(const DoraNorm&, const ParallelFor&);
  void (*dora_magnitude_fwd)(const DoraMagnitudeFwd&, const ParallelFor&);
  void (*dora_magnitude_bwd)(const DoraMagnitudeBwd&, const ParallelFor&);
  void (*dora_dropout_fwd)(const DoraDropoutFwd&, const ParallelFor&);
  void (*dora_dropout_bwd)(const DoraDropoutBwd&, const ParallelFor&);
};

// The best set that this CPU runs, or the one that FASTLORA_CPU_ISA names if it is lower.
// Throws std::runtime_error for an unknown name, or for one that this CPU or build lacks.
const Kernels& kernels();

// The sets that were compiled, from the plainest on, separated by spaces.
const char* compiled_isas();

}  // namespace fastlora
