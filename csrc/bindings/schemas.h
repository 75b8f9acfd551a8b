// Parts of schemas that several files share. Formulas and shapes: fastlora/reference/.
#pragma once

#define FASTLORA_QUANT                                                 \
  "Tensor weight, Tensor absmax, Tensor code, Tensor? nested_absmax, " \
  "Tensor? nested_code, Tensor? nested_offset, int blocksize, "

#define FASTLORA_QUANTIZE_4BIT                                               \
  "quantize_4bit(Tensor weight, Tensor bounds, Tensor order, int blocksize)" \
  " -> (Tensor packed, Tensor absmax)"
#define FASTLORA_DEQUANTIZE_4BIT_OUT "dequantize_4bit_out(" FASTLORA_QUANT "Tensor(a!) out) -> ()"

#define FASTLORA_LORA "Tensor lora_A, Tensor lora_B, "
#define FASTLORA_DROPOUT "float scaling, float dropout_p, Tensor? seed"
#define FASTLORA_NEEDS ", bool need_dx, bool need_dA, bool need_dB, bool need_dbias"
