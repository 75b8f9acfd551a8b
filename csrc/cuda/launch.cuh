// Starting a kernel. tests/csrc/simt/cuda/launch.cuh does the same on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/kernels.h"

namespace fastlora::cuda {

// CUDA's own words, null for success.
inline const char* words_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Enqueues `blocks` blocks of `threads` threads. Returns null, or what CUDA says against it.
template <class Params>
const char* launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes,
                   Stream stream, const Params& params) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (shared_bytes > kAlwaysAllowed) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return words_of(error);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(params);
  return words_of(cudaGetLastError());
}

inline const char* use(int device) { return words_of(cudaSetDevice(device)); }

// Null if a device can run `kernel`.
template <class Params>
const char* fault_on(int device, void (*kernel)(Params)) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  cudaSetDevice(before);
  cudaGetLastError();  // the next launch is not to blame
  return words_of(error);
}

// How many blocks with `shared_bytes` a multiprocessor of the current device has memory for, `most`
// at most.
inline int blocks_at_once(size_t shared_bytes, int most) {
  int device = 0, all = 0, reserved = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  const int fit = all / (static_cast<int>(shared_bytes) + reserved);
  return fit < 1 ? 1 : fit < most ? fit : most;
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  return count;
}

}  // namespace fastlora::cuda
