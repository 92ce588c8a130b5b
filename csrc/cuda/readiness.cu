// Whether the kernels can run on a device, found out without launching one.
#include <algorithm>
#include <string>
#include <string_view>

#include "cuda/device.cuh"
#include "cuda/kernel_list.h"

namespace gradprobe::cuda {
namespace {

// Within a major version, a driver runs programs of newer toolkits; large parameters need CUDA 12.1 besides.
constexpr int kNeededDriver = std::max(CUDART_VERSION / 1000 * 1000, kParameterBytes > 4096 ? 12010 : 0);

std::string version_text(int version) {  // 12040 is CUDA 12.4
  return "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string driver_refusal() {
  int version = 0;
  const cudaError_t error = cudaDriverGetVersion(&version);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (version == 0) return "no NVIDIA driver is installed";
  if (version >= kNeededDriver) return "";
  return "needed a driver for " + version_text(kNeededDriver) + " or newer, got one for " + version_text(version) +
         ": update the driver";
}

// The kernel's name without its namespaces, e.g. "sum_chunks<float, 128>".
std::string_view name_of(std::string_view description) {
  const std::string_view key = "kernel = ";
  if (const auto at = description.find(key); at != std::string_view::npos) description.remove_prefix(at + key.size());
  const auto scope = description.substr(0, description.find('<')).rfind("::");
  if (scope != std::string_view::npos) description.remove_prefix(scope + 2);
  return description.substr(0, description.rfind(']'));
}

std::string capability(int device) {
  int major = 0;
  int minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return std::to_string(major) + "." + std::to_string(minor);
}

}  // namespace
}  // namespace gradprobe::cuda

// Returns why the kernels cannot run on a device, "" if they can, and null if there is no memory to find out. Loads
// every kernel on the device, because a kernel that is loaded at its first launch cannot be captured into a CUDA graph,
// and makes the device current. If `device` is negative, checks the driver and uses no device.
extern "C" __attribute__((visibility("default"))) const char* gradprobe_cuda_refusal(int device) {
  using namespace gradprobe::cuda;
  static thread_local std::string reason;
  reason = driver_refusal();
  if (!reason.empty() || device < 0) return reason.c_str();
  cudaError_t error = cudaSetDevice(device);
  for (const ListedKernel* kernel = first_kernel; error == cudaSuccess && kernel != nullptr; kernel = kernel->next) {
    cudaFuncAttributes attributes{};
    error = cudaFuncGetAttributes(&attributes, kernel->function);
    const bool fits = attributes.maxThreadsPerBlock >= kThreads;
    if (error == cudaSuccess && fits) continue;
    reason = "kernel ";
    reason += name_of(kernel->description);
    if (error == cudaSuccess) {
      reason += ": needed blocks of " + std::to_string(kThreads) + " threads, got at most " +
                std::to_string(attributes.maxThreadsPerBlock);
      return reason.c_str();
    }
    reason += " on compute capability " + capability(device) + ": ";
  }
  if (error == cudaSuccess) return reason.c_str();
  cudaGetLastError();  // the caller's next launch must not report it
  if (error == cudaErrorMemoryAllocation) return nullptr;
  reason += cudaGetErrorString(error);
  return reason.c_str();
}
