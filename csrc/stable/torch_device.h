// The device functions that the registration of the CUDA kernels needs from torch. Its tests without a GPU replace this
// header (GRADPROBE_TORCH_DEVICE).
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#define GRADPROBE_NAMESPACE gradprobe
#define GRADPROBE_DISPATCH_KEY CUDA

namespace gradprobe::cuda {

inline constexpr auto kDeviceType = torch::headeronly::DeviceType::CUDA;
inline constexpr const char* kDeviceName = "cuda";

// Makes a device current for torch and for this library's own CUDA runtime, which is linked statically.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t index) : guard_(index) {
    const cudaError_t error = cudaSetDevice(index);
    STD_TORCH_CHECK(error == cudaSuccess, "cuda:", index, " cannot be used: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// Returns torch's current stream: from torch 2.13 on through the stable ABI, before only through a symbol of
// libtorch_cuda. Both are looked up at run time so that one library loads with every torch, including CPU builds.
inline cudaStream_t current_stream(int32_t index) {
  using NativeHandle = AOTITorchError (*)(StreamHandle, void**);
  static const auto native_handle = reinterpret_cast<NativeHandle>(dlsym(RTLD_DEFAULT, "torch_stream_native_handle"));
  void* stream = nullptr;
  if (native_handle != nullptr) {
    StreamHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(index, &handle));
    const AOTITorchError error = native_handle(handle, &stream);
    aoti_torch_delete_stream(handle);
    STABLE_TORCH_ERROR_CODE_CHECK(error);
    return static_cast<cudaStream_t>(stream);
  }
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const auto of_libtorch_cuda = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(of_libtorch_cuda != nullptr, "this torch has no function for its current CUDA stream");
  STABLE_TORCH_ERROR_CODE_CHECK(of_libtorch_cuda(index, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace gradprobe::cuda
