// The functions of this instruction set, for dispatch.cpp.
#include "../table.h"

namespace fastlora {
namespace FASTLORA_ISA {

#define FASTLORA_TEXT_(x) #x
#define FASTLORA_TEXT(x) FASTLORA_TEXT_(x)

extern const Kernels kTable;
const Kernels kTable = {
    FASTLORA_TEXT(FASTLORA_ISA), lora_linear_fwd,    lora_linear_bwd,  lora_embedding_fwd,
    lora_embedding_bwd,          quantize_4bit,      dequantize_4bit,  dora_norm,
    dora_magnitude_fwd,          dora_magnitude_bwd, dora_dropout_fwd, dora_dropout_bwd};

}  // namespace FASTLORA_ISA
}  // namespace fastlora
