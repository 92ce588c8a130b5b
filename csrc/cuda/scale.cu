// Multiplies many tensors by a number on the device, for gradient clipping: the host does not wait for the norm, and no
// tensor is read if the number is 1.
#include "cuda/table.cuh"

namespace gradprobe::cuda {
namespace {

constexpr int kLoads = 4;  // 16-byte loads in flight per thread

template <typename T>
__device__ __forceinline__ T scaled(T x, Wide<T> factor) {
  return narrowed<T>(widened(x) * factor);
}

template <typename T>
__device__ __forceinline__ Vector<T> scaled(Vector<T> vector, Wide<T> factor) {
#pragma unroll
  for (int i = 0; i < kVectorNumel<T>; ++i) vector.element[i] = scaled(vector.element[i], factor);
  return vector;
}

template <typename T, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    scale_chunks(const TensorTable<kCapacity> __grid_constant__ table, const void* coefficient,
                 bool coefficient_is_double) {
  const auto factor = static_cast<Wide<T>>(coefficient_is_double ? *static_cast<const double*>(coefficient)
                                                                 : *static_cast<const float*>(coefficient));
  if (factor == Wide<T>{1}) return;

  constexpr int kNumel = kVectorNumel<T>;
  const Piece<T> piece = find_piece<T>(table, blockIdx.x);
  T* begin = const_cast<T*>(piece.begin);
  const Split split = split_range(begin, piece.numel);
  T* vectors = begin + split.head;
  const int thread = static_cast<int>(threadIdx.x);

  int v = thread;
#pragma unroll 1  // one iteration has enough loads in flight
  for (; v + (kLoads - 1) * kThreads < split.n_vectors; v += kLoads * kThreads) {
    Vector<T> loaded[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) loaded[l] = load_vector(vectors + (v + l * kThreads) * kNumel);
#pragma unroll
    for (int l = 0; l < kLoads; ++l) store_vector(vectors + (v + l * kThreads) * kNumel, scaled(loaded[l], factor));
  }
  for (; v < split.n_vectors; v += kThreads) {
    store_vector(vectors + v * kNumel, scaled(load_vector(vectors + v * kNumel), factor));
  }
  if (thread < split.head) begin[thread] = scaled(begin[thread], factor);
  if (thread < split.tail) {
    T& last = vectors[split.n_vectors * kNumel + thread];
    last = scaled(last, factor);
  }
}

template <typename T, int kCapacity>
cudaError_t scale_tensors(const TensorSpan* tensors, int64_t n_tensors, const void* coefficient,
                          bool coefficient_is_double, cudaStream_t stream) {
  Packer<T, kCapacity> packer;
  const auto flush = [&]() -> cudaError_t {
    if (packer.n_blocks() == 0) return cudaSuccess;
    const cudaError_t error = launch<scale_chunks<T, kCapacity>>(packer.n_blocks(), stream, packer.table(), coefficient,
                                                                 coefficient_is_double);
    packer.clear();
    return error;
  };
  for (int64_t k = 0; k < n_tensors; ++k) {
    if (tensors[k].numel == 0) continue;
    if (!packer.fits(tensors[k])) {
      if (const cudaError_t error = flush()) return error;
    }
    packer.add(tensors[k]);
  }
  return flush();
}

}  // namespace

cudaError_t scale(const TensorSpan* tensors, int64_t n_tensors, Element element, const void* coefficient,
                  Element coefficient_element, cudaStream_t stream) {
  if (coefficient_element != Element::f32 && coefficient_element != Element::f64) return cudaErrorInvalidValue;
  const bool is_double = coefficient_element == Element::f64;
  return with_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_capacity(n_tensors, [&](auto capacity) {
      return scale_tensors<T, capacity.value>(tensors, n_tensors, coefficient, is_double, stream);
    });
  });
}

}  // namespace gradprobe::cuda
