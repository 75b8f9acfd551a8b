// Every instruction that the kernels ask for by name, and what differs between nvcc and a host
// compiler. tests/csrc/simt/cuda/ptx.cuh has the same functions for a CPU: kernels include
// "cuda/ptx.cuh", and the order of the include folders decides which of the two they get.
//
// Shared memory is addressed by 32-bit numbers, as the instructions do, and is touched by the
// functions below alone: so an emulation sees each access.
#pragma once

#include <cstdint>

namespace fastlora::cuda {

#define FASTLORA_DEVICE __device__ __forceinline__
#define FASTLORA_HOST_DEVICE __host__ __device__ __forceinline__

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(16) Words4 {
  uint32_t w[4];
};

// ---- where a thread is -------------------------------------------------------------------------

// Read anew at each call, where the compiler would keep a register instead.
FASTLORA_DEVICE int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
FASTLORA_DEVICE int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// ---- conversion --------------------------------------------------------------------------------

FASTLORA_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
FASTLORA_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

FASTLORA_DEVICE float to_float(float value) { return value; }
FASTLORA_DEVICE float to_float(bf16 value) { return as_float(uint32_t{value.bits} << 16); }
FASTLORA_DEVICE float to_float(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// Two floats rounded to nearest even, `low` in the lower half.
template <class T>
FASTLORA_DEVICE uint32_t pack(float low, float high);
template <>
FASTLORA_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
FASTLORA_DEVICE uint32_t pack<f16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// ---- arithmetic --------------------------------------------------------------------------------

// Rounded each on its own: the compiler never makes a fused multiply-add of them.
FASTLORA_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
FASTLORA_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
FASTLORA_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
// a * b + c, rounded once.
FASTLORA_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

FASTLORA_DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// The place of the highest bit that is set.
FASTLORA_DEVICE int log2_of(uint32_t a) { return 31 - __clz(static_cast<int>(a)); }

// Byte i of the result is byte (nibble i of the selector) of the eight bytes a, b.
FASTLORA_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// The upper half of the 64 bits `high`, `low` shifted left by 0 to 31 bits.
FASTLORA_DEVICE uint32_t shift_left(uint32_t high, uint32_t low, int bits) {
  return __funnelshift_l(low, high, static_cast<uint32_t>(bits));
}

// ---- across lanes and warps --------------------------------------------------------------------

FASTLORA_DEVICE void block_barrier() { __syncthreads(); }
FASTLORA_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
FASTLORA_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
FASTLORA_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- global memory -----------------------------------------------------------------------------

// Read once: does not push other data out of the cache.
FASTLORA_DEVICE Words2 load_once(const Words2* address) {
  Words2 v;
  asm("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(address));
  return v;
}

// ---- shared memory -----------------------------------------------------------------------------

// The block's dynamic shared memory; the address is a multiple of 1024.
FASTLORA_DEVICE uint32_t shared_memory() {
  extern __shared__ __align__(1024) uint8_t dynamic_shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

// T has 4, 8 or 16 bytes; the address is a multiple of its size.
template <class T>
FASTLORA_DEVICE T load_shared(uint32_t address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}
template <class T>
FASTLORA_DEVICE void store_shared(uint32_t address, T value) {
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

// Starts the copy of 4 bytes; those past `bytes` become zero and are not read.
FASTLORA_DEVICE void copy_async_word(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}
// Starts the copy of 16 bytes; those past `bytes` become zero and are not read.
FASTLORA_DEVICE void copy_async(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}
// Closes the group of the copies that this thread has started since the last one.
FASTLORA_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kLeft of this thread's groups, the latest, are under way.
template <int kLeft>
FASTLORA_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// ---- matrices ----------------------------------------------------------------------------------
//
// With g = lane / 4 and t = lane % 4. A register holds two 16-bit elements, the first below.

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
// r[i] holds elements (g, 2t), (g, 2t + 1) of matrix i.
FASTLORA_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same of the transposed matrices: r[i] holds (2t, g), (2t + 1, g).
FASTLORA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8]. Pairs start at
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)   b: (2t, g), (2t + 8, g), down a column
//   d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1), one float each
template <class T>
FASTLORA_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
FASTLORA_DEVICE void multiply_add<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FASTLORA_DEVICE void multiply_add<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastlora::cuda
