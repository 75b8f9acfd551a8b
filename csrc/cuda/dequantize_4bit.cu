// out = code[q] * absmax, the product in fp32 and rounded once; a nested absmax is decoded in the
// same launch.
//
// Bound by memory: a thread takes eight codes at a time, so that neighbours read four bytes and write
// sixteen (fp32: twice sixteen) beside each other.
#include "cuda/launch.cuh"
#include "cuda/parts.cuh"
#include "cuda/weights.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCodesAtOnce = 8, kRounds = 4;
constexpr int64_t kChunk = kThreads * kCodesAtOnce * kRounds;  // codes of a thread block

FASTLORA_DEVICE void store_eight(float* out, const float (&v)[8]) {
  auto* words = reinterpret_cast<Words4*>(out);
  words[0] = {{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])}};
  words[1] = {{as_bits(v[4]), as_bits(v[5]), as_bits(v[6]), as_bits(v[7])}};
}
template <class T>
FASTLORA_DEVICE void store_eight(T* out, const float (&v)[8]) {
  *reinterpret_cast<Words4*>(out) = {
      {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])}};
}

FASTLORA_DEVICE void store_one(float* out, float value) { *out = value; }
template <class T>
FASTLORA_DEVICE void store_one(T* out, float value) {
  out->bits = static_cast<uint16_t>(pack<T>(value, 0.0f));
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize(const Dequantize4bit p) {
  const uint32_t tables = shared_memory();
  copy_tables(tables, p.quant, thread_index(), kThreads);
  block_barrier();
  T* out = static_cast<T*>(p.out);
  const bool aligned = reinterpret_cast<uintptr_t>(p.quant.packed) % sizeof(uint32_t) == 0 &&
                       reinterpret_cast<uintptr_t>(p.out) % sizeof(Words4) == 0;
#pragma unroll
  for (int round = 0; round < kRounds; round++) {
    const int64_t first = int64_t{block_index()} * kChunk + round * (kThreads * kCodesAtOnce) +
                          thread_index() * kCodesAtOnce;
    if (first >= p.elements) return;
    const bool whole = aligned && first + kCodesAtOnce <= p.elements;
    uint32_t packed = 0;
    if (whole) {
      packed = *reinterpret_cast<const uint32_t*>(p.quant.packed + first / 2);
    } else {
      for (int i = 0; i < kCodesAtOnce / 2 && first + 2 * i < p.elements; i++) {
        packed |= static_cast<uint32_t>(p.quant.packed[first / 2 + i]) << (8 * i);
      }
    }
    const float absmax = absmax_value(p.quant, load_absmax(p.quant, first), tables);
    float v[kCodesAtOnce];
#pragma unroll
    for (int i = 0; i < kCodesAtOnce; i++) {
      const uint32_t code = packed >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0)) & 15;
      v[i] = multiply(load_shared<float>(tables + 4 * code), absmax);
    }
    if (whole) {
      store_eight(out + first, v);
    } else {
#pragma unroll
      for (int i = 0; i < kCodesAtOnce; i++) {
        if (first + i < p.elements) store_one(out + first + i, v[i]);
      }
    }
  }
}

template <class T>
const char* run(const Dequantize4bit& p, Stream stream) {
  return launch(dequantize<T>, ceil_div(p.elements, kChunk), kThreads, kTableBytes, stream, p);
}

}  // namespace

const char* dequantize_4bit(const Dequantize4bit& p, Stream stream) {
  if (p.elements == 0) return nullptr;
  switch (p.dtype) {
    case DType::f32:
      return run<float>(p, stream);
    case DType::bf16:
      return run<bf16>(p, stream);
    default:
      return run<f16>(p, stream);
  }
}

}  // namespace fastlora::cuda
