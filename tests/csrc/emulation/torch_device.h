// In the place of csrc/stable/torch_device.h: the registration of the CUDA kernels, on CPU tensors and emulated
// kernels.
#pragma once

#include <torch/headeronly/core/DeviceType.h>

#include <cstdint>

#include "cuda_runtime.h"

#define GRADPROBE_NAMESPACE gradprobe_emulated
#define GRADPROBE_DISPATCH_KEY CPU

namespace gradprobe::cuda {

inline constexpr auto kDeviceType = torch::headeronly::DeviceType::CPU;
inline constexpr const char* kDeviceName = "cpu";

struct DeviceScope {
  explicit DeviceScope(int32_t) {}
  ~DeviceScope() {}  // keeps an unused one from being a warning
};

inline cudaStream_t current_stream(int32_t) { return nullptr; }

}  // namespace gradprobe::cuda
