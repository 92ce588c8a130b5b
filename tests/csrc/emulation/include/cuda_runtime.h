// Replaces the CUDA toolkit's header of this name when a host compiler compiles kernels (see emulation.h). It declares
// only what this project's kernels use; a kernel that needs more does not compile until it is added here.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
// One copy for all threads; `const T __grid_constant__ x` becomes a reference.
#define __grid_constant__ &
#define __launch_bounds__(...)
// A section of its own, which the scheduler poisons. GCC ignores the attribute in templates, so shared memory must be
// declared in plain functions (tested).
#define __shared__ __attribute__((section("emulated_shared"))) static

#define threadIdx (::emulation::current->thread)
#define blockIdx (::emulation::current->block)
#define blockDim (::emulation::current->block_dim)
#define gridDim (::emulation::current->grid_dim)

#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads(int line = __builtin_LINE()) { ::emulation::barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  ::emulation::warp_barrier(mask, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const unsigned lane = ::emulation::lane();
  return ::emulation::shuffle(mask, value, lane + delta < ::emulation::kWarp ? lane + delta : lane, line);
}

template <typename T>
T __ldg(const T* address) {
  ::emulation::check_aligned(address);
  return *address;
}

template <typename T>
T __ldcg(const T* address) {
  ::emulation::check_aligned(address);
  return *address;
}

template <typename T>
void __stcg(T* address, T value) {
  ::emulation::check_aligned(address);
  *address = value;
}

// Threads are fibers of one thread; a plain addition would look like a race to the thread sanitizer.
inline int atomicAdd(int* address, int value) {
  ::emulation::check_aligned(address);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

using cudaStream_t = struct EmulatedStream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

template <typename... Parameters, size_t... index>
void emulated_call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<index...>) {
  kernel(*static_cast<std::remove_cvref_t<Parameters>*>(arguments[index])...);
}

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             size_t dynamic_shared_bytes, cudaStream_t) {
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "kernel parameters are limited to 32,764 bytes");
  if (grid.x == 0 || block.x == 0 || block.x * block.y * block.z > 1024 || dynamic_shared_bytes != 0)
    return cudaErrorInvalidConfiguration;
  ::emulation::count_launch((sizeof(Parameters) + ... + 0));
  ::emulation::run_grid({grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                        [&] { emulated_call(kernel, arguments, std::index_sequence_for<Parameters...>{}); });
  return cudaSuccess;
}
