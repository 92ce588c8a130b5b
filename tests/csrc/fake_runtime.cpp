// A CUDA runtime without a device: it keeps a list of the kernels of the objects that are linked with it, and answers
// what a test has set. It takes the place of libcudart in test_cuda_readiness.py and test_ptx.py.
#include <cuda_runtime_api.h>

#include <map>
#include <set>
#include <string>

namespace {

struct {
  int driver = CUDART_VERSION;
  cudaError_t set_device = cudaSuccess;
  cudaError_t load = cudaSuccess;  // of the kernels whose name contains the text
  std::string of_kernels;
  int max_threads = 1024;
} answers;

std::map<const void*, std::string>& registered() {
  static std::map<const void*, std::string> kernels;  // before the static objects that fill it
  return kernels;
}

std::set<const void*> loaded;
int n_questions = 0;
int device = -1;

}  // namespace

extern "C" {

void fake_answer(int driver, int set_device, int load, const char* of_kernels, int max_threads) {
  answers = {driver, static_cast<cudaError_t>(set_device), static_cast<cudaError_t>(load), of_kernels, max_threads};
  loaded.clear();
  n_questions = 0;
  device = -1;
}

int fake_n_registered() { return static_cast<int>(registered().size()); }
int fake_n_loaded() { return static_cast<int>(loaded.size()); }
int fake_n_questions() { return n_questions; }
int fake_device() { return device; }

// What nvcc's host code calls when the library is loaded and when it launches a kernel.

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  registered().emplace(function, name);
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }

// Runs a kernel, if the library that is linked with this can.
__attribute__((weak)) void fake_launch(const char* name, unsigned n_blocks, unsigned n_threads, void** arguments);

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  if (fake_launch == nullptr) return cudaErrorNotSupported;
  fake_launch(registered().at(function).c_str(), grid.x, block.x, arguments);
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = answers.driver;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int index) {
  device = index;
  return answers.set_device;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 6 : 1;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  ++n_questions;
  const auto kernel = registered().find(function);
  if (kernel == registered().end()) return cudaErrorInvalidDeviceFunction;
  const bool fails = kernel->second.find(answers.of_kernels) != std::string::npos;
  if (fails && answers.load != cudaSuccess) return answers.load;
  attributes->maxThreadsPerBlock = fails ? answers.max_threads : 1024;
  loaded.insert(function);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice ? "no kernel image is available for execution on the device"
         : error == cudaErrorInvalidDevice        ? "invalid device ordinal"
                                                  : "another error";
}
}
