// Replaces csrc/stable/torch_device.h to register emulated kernels for CPU tensors.
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
  ~DeviceScope() {}  // avoids a warning about an unused variable
};

inline cudaStream_t current_stream(int32_t) { return nullptr; }

}  // namespace gradprobe::cuda
