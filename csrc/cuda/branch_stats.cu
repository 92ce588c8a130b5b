// Statistics of the two parts of the gradient at x, the input of a residual block, reading each once: those of the
// branch's part, and the sum of its products with the shortcut's part, in double. Both have the same dense layout.
#include "cuda/finish.cuh"
#include "cuda/thread_sums.cuh"

namespace gradprobe::cuda {
namespace {

constexpr int kLoads = 2;  // 16-byte loads in flight per thread and operand

// The sum of a thread's products. As Stats, it is in sum_sq, with an abs_max that has its range exponent.
template <typename Number>
struct ThreadProducts {
  double sum = 0.0;  // products of floats are exact in double and in its range

  __device__ __forceinline__ void add(float a, float b) { sum += static_cast<double>(a) * static_cast<double>(b); }

  __device__ __forceinline__ Stats stats() const { return {0.0, 0.0, sum, 1.0, 0, 0}; }
};

template <>
struct ThreadProducts<double> {
  double sum = 0.0;
  double sum_of_large = 0.0;  // of the products of a * 2**-600
  double sum_of_small = 0.0;  // of a * 2**600
  int64_t a_max_bits = 0;
  int64_t b_max_bits = 0;

  __device__ __forceinline__ void add(double a, double b) {
    sum += a * b;
    sum_of_large += (a * 0x1p-600) * (b * 0x1p-600);
    sum_of_small += (a * 0x1p+600) * (b * 0x1p+600);
    a_max_bits = abs_bits(a) > a_max_bits ? abs_bits(a) : a_max_bits;
    b_max_bits = abs_bits(b) > b_max_bits ? abs_bits(b) : b_max_bits;
  }

  __device__ __forceinline__ Stats stats() const {
    const double geometric_mean = sqrt(double_of_bits(a_max_bits)) * sqrt(double_of_bits(b_max_bits));
    switch (range_exponent(geometric_mean)) {
      case 600:
        return {0.0, 0.0, sum_of_large, 0x1p+600, 0, 0};
      case -600:
        return {0.0, 0.0, sum_of_small, 0x1p-600, 0, 0};
      default:  // a sum of zero needs no range
        return {0.0, 0.0, sum, geometric_mean == 0.0 ? 0.0 : 1.0, 0, 0};
    }
  }
};

template <typename T>
struct Parts {
  ThreadSums<T> branch;
  ThreadProducts<Wide<T>> products;

  template <int n>
  __device__ __forceinline__ void add(const Vector<T> (&of_branch)[n], const Vector<T> (&of_shortcut)[n]) {
#pragma unroll
    for (int l = 0; l < n; ++l) {
#pragma unroll
      for (int i = 0; i < kVectorNumel<T>; ++i) {
        products.add(widened(of_branch[l].element[i]), widened(of_shortcut[l].element[i]));
      }
    }
    branch.add(of_branch);
  }

  __device__ __forceinline__ void add(T of_branch, T of_shortcut) {
    products.add(widened(of_branch), widened(of_shortcut));
    branch.add(of_branch);
  }
};

// Adds n vectors, kThreads vectors apart.
template <typename T, int n>
__device__ __forceinline__ void add_vectors(Parts<T>& parts, const T* branch, const T* shortcut) {
  Vector<T> of_branch[n];
  Vector<T> of_shortcut[n];
#pragma unroll
  for (int l = 0; l < n; ++l) {
    of_branch[l] = load_constant_vector(branch + l * kThreads * kVectorNumel<T>);
    of_shortcut[l] = load_constant_vector(shortcut + l * kThreads * kVectorNumel<T>);
  }
  parts.add(of_branch, of_shortcut);
}

// partials [2, n_chunks] and rows [2, kStats]: branch, products. Two kinds of sums need more registers than
// kBlocksPerMultiprocessor allows.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor - 1)
    branch_chunks(const T* branch, const T* shortcut, int64_t numel, Stats* partials, double* rows,
                  const int32_t* enabled) {
  if (!is_on(enabled)) return;
  constexpr int kNumel = kVectorNumel<T>;
  const Chunk chunk = chunk_range(0, numel, 0, blockIdx.x, chunk_numel<T>(numel));
  branch += chunk.begin;
  shortcut += chunk.begin;
  const int n = static_cast<int>(chunk.end - chunk.begin);
  const uintptr_t apart = reinterpret_cast<uintptr_t>(branch) ^ reinterpret_cast<uintptr_t>(shortcut);
  // Operands that are not aligned at the same element are read one element at a time.
  const Split split = apart % kVectorBytes == 0 ? split_range(branch, n) : Split{n, 0, 0};
  const int thread = static_cast<int>(threadIdx.x);

  Parts<T> parts;
  int v = thread;
  for (; v + (kLoads - 1) * kThreads < split.n_vectors; v += kLoads * kThreads) {
    const int at = split.head + v * kNumel;
    add_vectors<T, kLoads>(parts, branch + at, shortcut + at);
  }
  for (; v < split.n_vectors; v += kThreads) {
    const int at = split.head + v * kNumel;
    add_vectors<T, 1>(parts, branch + at, shortcut + at);
  }
  for (int i = thread; i < split.head; i += kThreads) parts.add(branch[i], shortcut[i]);
  if (thread < split.tail) {
    const int at = split.head + split.n_vectors * kNumel + thread;
    parts.add(branch[at], shortcut[at]);
  }

  const Stats of_branch = merge_block<Wide<T>>(parts.branch.stats());
  __syncthreads();  // merge_block's shared memory is reused
  const Stats of_products = merge_block<Wide<T>>(parts.products.stats());
  if (thread != 0) return;
  if (gridDim.x == 1) {
    finish(of_branch, rows);
    finish(of_products, rows + kStats);
  } else {
    partials[blockIdx.x] = of_branch;
    partials[gridDim.x + blockIdx.x] = of_products;
  }
}

}  // namespace

cudaError_t branch_stats(const void* branch, const void* shortcut, int64_t numel, Element element, Stats* partials,
                         double* rows, const int32_t* enabled, cudaStream_t stream) {
  const int64_t n_chunks = count_partials(numel, element);
  return with_type(element, [&](auto* type) -> cudaError_t {
    using T = std::remove_pointer_t<decltype(type)>;
    if (n_chunks > 0) {
      const cudaError_t error =
          launch<branch_chunks<T>>(n_chunks, stream, static_cast<const T*>(branch), static_cast<const T*>(shortcut),
                                   numel, partials, rows, enabled);
      if (error) return error;
    }
    if (n_chunks == 1) return cudaSuccess;
    Finisher<Wide<T>> finisher(partials, rows, enabled, stream);
    for (int row = 0; row < 2; ++row) finisher.add(row * n_chunks, n_chunks, row);
    return finisher.flush();
  });
}

}  // namespace gradprobe::cuda
