// The device and the stream that torch is working on. tests/csrc/simt/bindings/cuda_stream.h stands
// in for it where kernels are emulated.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/kernels.h"

// Only a torch with CUDA has it: weak, so that this library loads into any torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

namespace fastlora {

// Makes the tensor's device the current one while it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_) {}

  cuda::Stream stream() const {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace fastlora
