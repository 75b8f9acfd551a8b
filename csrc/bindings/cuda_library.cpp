// What Python asks of the library fastlora/_CUDA.so before it gives it any work.
#include "bindings/cuda_stream.h"
#include "cuda/kernels.h"

// Null if the kernels run on a device, else why they don't: an architecture that they were not
// compiled for, a driver that is too old, a torch without CUDA.
extern "C" __attribute__((visibility("default"))) const char* fastlora_cuda_fault(int device) {
  if (fastlora::get_current_stream() == nullptr) return "this torch has no CUDA";
  return fastlora::cuda::device_fault(device);
}
