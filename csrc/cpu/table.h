// The entry points that each instruction set defines, one in each file under kernels/.
#pragma once

#include "runtime/kernels.h"

namespace fastlora {
namespace FASTLORA_ISA {

void lora_linear_fwd(LoraLinearFwd* layers, int64_t count, const ParallelFor& parallel);
void lora_linear_bwd(LoraLinearBwd* layers, int64_t count, const ParallelFor& parallel);
void lora_embedding_fwd(const LoraEmbeddingFwd& p, const ParallelFor& parallel);
void lora_embedding_bwd(const LoraEmbeddingBwd& p, const ParallelFor& parallel);
void quantize_4bit(const Quantize4bit& p, const ParallelFor& parallel);
void dequantize_4bit(const Dequantize4bit& p, const ParallelFor& parallel);
void dora_norm(const DoraNorm& p, const ParallelFor& parallel);
void dora_magnitude_fwd(const DoraMagnitudeFwd& p, const ParallelFor& parallel);
void dora_magnitude_bwd(const DoraMagnitudeBwd& p, const ParallelFor& parallel);
void dora_dropout_fwd(const DoraDropoutFwd& p, const ParallelFor& parallel);
void dora_dropout_bwd(const DoraDropoutBwd& p, const ParallelFor& parallel);

}  // namespace FASTLORA_ISA
}  // namespace fastlora
