// Device code that the kernels share: element types, 16-byte access, sums of a block, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/chunks.h"
#include "core/float8.h"
#include "core/stats.h"
#include "cuda/kernel_list.h"
#include "cuda/launch.h"

namespace gradprobe::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarp = 32;
// Blocks that a kernel's registers should allow: 1024 threads, half of an H100's, all of a T4's.
inline constexpr int kBlocksPerMultiprocessor = 4;
inline constexpr int kVectorBytes = 16;
inline constexpr int kChunkBytes = 64 * 1024;

template <typename T>
inline constexpr int kVectorNumel = kVectorBytes / static_cast<int>(sizeof(T));

// Chunks of one tensor, whose partial results one block merges.
inline constexpr int kMaxChunks = 8192;

template <typename T>
inline constexpr int kChunkNumel = kChunkBytes / static_cast<int>(sizeof(T));

// Elements in a chunk of a tensor: more than kChunkNumel if it is above 512 MiB.
template <typename T>
GRADPROBE_HD int64_t chunk_numel(int64_t numel) {
  return grown_chunk(numel, kChunkNumel<T>, kMaxChunks);
}

// Size limit of kernel parameters: 32,764 bytes from CUDA 12.1 on (compute capability 7.0 and up), 4,096 before.
inline constexpr int kParameterBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;

// ---- Elements

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }

template <typename T>
__device__ __forceinline__ T narrowed(Wide<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename T>
struct alignas(kVectorBytes) Vector {
  T element[kVectorNumel<T>];
};

// Loads from memory that nobody writes while the kernel runs.
template <typename T>
__device__ __forceinline__ Vector<T> load_constant_vector(const T* address) {
  const uint4 bytes = __ldg(reinterpret_cast<const uint4*>(address));
  Vector<T> vector;
  memcpy(&vector, &bytes, sizeof vector);
  return vector;
}

// Loads from memory that the kernel may write in place.
template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* address) {
  const uint4 bytes = __ldcg(reinterpret_cast<const uint4*>(address));
  Vector<T> vector;
  memcpy(&vector, &bytes, sizeof vector);
  return vector;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T>& vector) {
  uint4 bytes;
  memcpy(&bytes, &vector, sizeof bytes);
  __stcg(reinterpret_cast<uint4*>(address), bytes);
}

// Calls body with a null pointer to the C++ type of `element`, unless that is float8.
template <typename Body>
cudaError_t with_type(Element element, Body&& body) {
  switch (element) {
    case Element::f16:
      return body(static_cast<__half*>(nullptr));
    case Element::bf16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
    case Element::f32:
      return body(static_cast<float*>(nullptr));
    case Element::f64:
      return body(static_cast<double*>(nullptr));
    default:
      break;
  }
  return cudaErrorInvalidValue;
}

// The same for every element that is measured.
template <typename Body>
cudaError_t with_measured_type(Element element, Body&& body) {
  if (element == Element::e4m3) return body(static_cast<Float8E4M3*>(nullptr));
  if (element == Element::e5m2) return body(static_cast<Float8E5M2*>(nullptr));
  return with_type(element, body);
}

// A range split at 16-byte boundaries: `head` single elements, vectors, `tail` single elements.
struct Split {
  int head;
  int n_vectors;
  int tail;
};

template <typename T>
__device__ __forceinline__ Split split_range(const T* begin, int numel) {
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(begin) % kVectorBytes);
  int head = past == 0 ? 0 : (kVectorBytes - past) / static_cast<int>(sizeof(T));
  head = head < numel ? head : numel;
  const int n_vectors = (numel - head) / kVectorNumel<T>;
  return {head, n_vectors, numel - head - n_vectors * kVectorNumel<T>};
}

// ---- Sums of a block

__device__ __forceinline__ Stats shuffle_down(const Stats& stats, int delta) {
  constexpr unsigned kAllLanes = 0xffffffffu;
  return {__shfl_down_sync(kAllLanes, stats.sum, delta),    __shfl_down_sync(kAllLanes, stats.sum_abs, delta),
          __shfl_down_sync(kAllLanes, stats.sum_sq, delta), __shfl_down_sync(kAllLanes, stats.abs_max, delta),
          __shfl_down_sync(kAllLanes, stats.n_zero, delta), __shfl_down_sync(kAllLanes, stats.n_nonfinite, delta)};
}

// Merges statistics of elements that are computed in `Number`.
template <typename Number>
__device__ __forceinline__ Stats merge_of(const Stats& a, const Stats& b) {
  return std::is_same_v<Number, double> ? merge(a, b) : merge_alike(a, b);
}

[[maybe_unused]] static __device__ Stats* shared_stats() {
  __shared__ Stats of_thread[kThreads];
  return of_thread;
}

// Merges the statistics of all threads of the block in a fixed order; thread 0 gets the result. Two calls need a
// barrier between them.
template <typename Number>
__device__ Stats merge_block(const Stats& mine) {
  Stats* of_thread = shared_stats();
  of_thread[threadIdx.x] = mine;
  __syncthreads();
  Stats all = identity();
  if (threadIdx.x < kWarp) {
    all = of_thread[threadIdx.x];
#pragma unroll 1  // in registers for several merges, fewer blocks would fit
    for (int t = static_cast<int>(threadIdx.x) + kWarp; t < kThreads; t += kWarp) {
      all = merge_of<Number>(all, of_thread[t]);
    }
    for (int delta = kWarp / 2; delta > 0; delta /= 2) all = merge_of<Number>(all, shuffle_down(all, delta));
  }
  return all;
}

// ---- Whether statistics are taken

__device__ __forceinline__ bool is_on(const int32_t* enabled) { return enabled == nullptr || *enabled != 0; }

// ---- Launching

template <typename... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t n_blocks, cudaStream_t stream,
                          const std::type_identity_t<Parameters>&... arguments) {
  if (n_blocks < 1 || n_blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(n_blocks)), dim3(kThreads), pointers, 0, stream);
}

// Enqueues a kernel, which is a template argument so that it is in the list of kernels before its first launch.
template <auto kernel, typename... Arguments>
cudaError_t launch(int64_t n_blocks, cudaStream_t stream, const Arguments&... arguments) {
  static_cast<void>(&listed<kernel>);
  return launch_kernel(kernel, n_blocks, stream, arguments...);
}

}  // namespace gradprobe::cuda
