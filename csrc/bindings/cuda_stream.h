// The device and the stream that torch is working on. tests/csrc/simt/bindings/cuda_stream.h stands
// in for it where kernels are emulated.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "cuda/kernels.h"

namespace fastlora {

using GetCurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// torch's function, or null without CUDA. It lies in a library that torch keeps to itself
// (RTLD_LOCAL), which the loader would not search for a name of this library.
inline GetCurrentStream get_current_stream() {
  static const GetCurrentStream found = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol =
        torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetCurrentStream>(symbol);
  }();
  return found;
}

// Makes the tensor's device the current one while it lives: torch's, and that of the CUDA runtime
// which is linked into this library.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_) {
    const char* error = cuda::set_device(device_);
    FASTLORA_CHECK(error == nullptr, "CUDA device ", device_, ": ", error);
  }

  cuda::Stream stream() const {
    FASTLORA_CHECK(get_current_stream() != nullptr, "this torch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(get_current_stream()(device_, &stream));
    return stream;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace fastlora
