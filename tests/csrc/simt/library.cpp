// torch.ops.fastlora_emulated: csrc/bindings/cuda_ops.cpp with emulated kernels, for CPU tensors.
// The schemas that the real library finds in fastlora._C, and controls of the emulation.
#include <torch/csrc/stable/library.h>

#include "bindings/schemas.h"
#include "simt.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora_emulated, m) {
  m.def(FASTLORA_QUANTIZE_4BIT);
  m.def(FASTLORA_DEQUANTIZE_4BIT_OUT);
}

extern "C" {
void simt_seed(uint64_t value) { simt::seed(value); }
simt::Counters simt_counters() { return simt::counters(); }
}
