// Schemas that the CPU and the CUDA library share. Formulas and shapes: fastlora/reference.py.
#pragma once

#define FASTLORA_QUANT                                                 \
  "Tensor weight, Tensor absmax, Tensor code, Tensor? nested_absmax, " \
  "Tensor? nested_code, Tensor? nested_offset, int blocksize, "

#define FASTLORA_QUANTIZE_4BIT                                               \
  "quantize_4bit(Tensor weight, Tensor bounds, Tensor order, int blocksize)" \
  " -> (Tensor packed, Tensor absmax)"
#define FASTLORA_DEQUANTIZE_4BIT_OUT \
  "dequantize_4bit_out(" FASTLORA_QUANT "Tensor(a!) out) -> Tensor(a!)"
