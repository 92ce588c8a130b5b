// The residual add in one pass: y = x + f, or max(x + f, 0), with the statistics of y. The backward computes the
// gradient of both operands, with the statistics of the incoming and the outgoing gradient. Both also without
// statistics. All operands have the same dense layout.
#include "cuda/finish.cuh"
#include "cuda/thread_sums.cuh"

namespace gradprobe::cuda {
namespace {

constexpr int kLoads = 2;  // 16-byte loads in flight per thread and operand

// Which tensors' statistics a pass takes.
enum class Counted { kNone, kOutgoing, kBoth };

struct Add {
  template <typename T>
  static __device__ __forceinline__ T apply(T x, T f) {
    return narrowed<T>(widened(x) + widened(f));
  }
};

struct AddRelu {
  template <typename T>
  static __device__ __forceinline__ T apply(T x, T f) {
    const Wide<T> sum = widened(x) + widened(f);
    return narrowed<T>(sum <= 0 ? Wide<T>{0} : sum);  // NaN passes, as in torch.relu
  }
};

struct MaskGradient {
  template <typename T>
  static __device__ __forceinline__ T apply(T grad_y, T y) {
    return widened(y) <= 0 ? narrowed<T>(Wide<T>{0}) : grad_y;  // a NaN in y passes the gradient, as in torch.relu
  }
};

template <typename T, Counted counted>
struct Sums {};

template <typename T>
struct Sums<T, Counted::kOutgoing> {
  ThreadSums<T> outgoing;
};

template <typename T>
struct Sums<T, Counted::kBoth> {
  ThreadSums<T> outgoing;
  ThreadSums<T> incoming;
};

// Computes n vectors, `stride` elements apart.
template <typename T, typename Operation, Counted counted, int n>
__device__ __forceinline__ void apply_vectors(const T* a, const T* b, T* out, int stride,
                                              [[maybe_unused]] Sums<T, counted>& sums) {
  Vector<T> of_a[n];
  Vector<T> of_b[n];
#pragma unroll
  for (int l = 0; l < n; ++l) {
    of_a[l] = load_vector(a + l * stride);
    of_b[l] = load_vector(b + l * stride);
  }
  if constexpr (counted == Counted::kBoth) sums.incoming.add(of_a);
#pragma unroll
  for (int l = 0; l < n; ++l) {
#pragma unroll
    for (int i = 0; i < kVectorNumel<T>; ++i) {
      of_a[l].element[i] = Operation::template apply<T>(of_a[l].element[i], of_b[l].element[i]);
    }
    store_vector(out + l * stride, of_a[l]);
  }
  if constexpr (counted != Counted::kNone) sums.outgoing.add(of_a);
}

template <typename T, typename Operation, Counted counted>
__device__ __forceinline__ void apply_element(const T* a, const T* b, T* out, [[maybe_unused]] Sums<T, counted>& sums) {
  const T result = Operation::template apply<T>(*a, *b);
  if constexpr (counted == Counted::kBoth) sums.incoming.add(*a);
  *out = result;
  if constexpr (counted != Counted::kNone) sums.outgoing.add(result);
}

__device__ __forceinline__ void put(const Stats& stats, bool is_whole, Stats* partial, double* row) {
  if (threadIdx.x != 0) return;
  if (is_whole) {
    finish(stats, row);
  } else {
    *partial = stats;
  }
}

// Computes a thread's part of a chunk of n elements.
template <typename T, typename Operation, Counted counted>
__device__ __forceinline__ void apply_chunk(const T* a, const T* b, T* out, int n, Sums<T, counted>& sums) {
  constexpr int kNumel = kVectorNumel<T>;
  const uintptr_t apart = (reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) |
                          (reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(out));
  // Operands that are not aligned at the same element are read one element at a time.
  const Split split = apart % kVectorBytes == 0 ? split_range(a, n) : Split{n, 0, 0};
  const int thread = static_cast<int>(threadIdx.x);

  int v = thread;
  for (; v + (kLoads - 1) * kThreads < split.n_vectors; v += kLoads * kThreads) {
    const int at = split.head + v * kNumel;
    apply_vectors<T, Operation, counted, kLoads>(a + at, b + at, out + at, kThreads * kNumel, sums);
  }
  for (; v < split.n_vectors; v += kThreads) {
    const int at = split.head + v * kNumel;
    apply_vectors<T, Operation, counted, 1>(a + at, b + at, out + at, 0, sums);
  }
  for (int i = thread; i < split.head; i += kThreads) apply_element<T, Operation, counted>(a + i, b + i, out + i, sums);
  if (thread < split.tail) {
    const int at = split.head + split.n_vectors * kNumel + thread;
    apply_element<T, Operation, counted>(a + at, b + at, out + at, sums);
  }
}

// rows: null, [1, kStats] (outgoing) or [2, kStats] (incoming, outgoing). partials: likewise, [*, n_chunks].
template <typename T, typename Operation, Counted counted>
// Two sets of sums need more registers than kBlocksPerMultiprocessor leaves.
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor - (counted == Counted::kBoth ? 2 : 0))
    join_chunks(const T* a, const T* b, T* out, int64_t numel, [[maybe_unused]] Stats* partials,
                [[maybe_unused]] double* rows, [[maybe_unused]] const int32_t* enabled) {
  const Chunk chunk = chunk_range(0, numel, 0, blockIdx.x, chunk_numel<T>(numel));
  a += chunk.begin;
  b += chunk.begin;
  out += chunk.begin;
  const int n = static_cast<int>(chunk.end - chunk.begin);
  if constexpr (counted != Counted::kNone) {
    if (!is_on(enabled)) {
      Sums<T, Counted::kNone> none;
      return apply_chunk<T, Operation, Counted::kNone>(a, b, out, n, none);
    }
  }
  Sums<T, counted> sums;
  apply_chunk<T, Operation, counted>(a, b, out, n, sums);

  [[maybe_unused]] const bool is_whole = gridDim.x == 1;
  if constexpr (counted == Counted::kBoth) {
    put(merge_block<Wide<T>>(sums.incoming.stats()), is_whole, partials + blockIdx.x, rows);
    __syncthreads();  // merge_block's shared memory is reused
    partials += gridDim.x;
    rows += kStats;
  }
  if constexpr (counted != Counted::kNone) {
    put(merge_block<Wide<T>>(sums.outgoing.stats()), is_whole, partials + blockIdx.x, rows);
  }
}

template <typename Operation, Counted counted>
cudaError_t join(const void* a, const void* b, void* out, int64_t numel, Element element, Stats* partials, double* rows,
                 const int32_t* enabled, cudaStream_t stream) {
  const int64_t n_chunks = count_partials(numel, element);
  return with_type(element, [&](auto* type) -> cudaError_t {
    using T = std::remove_pointer_t<decltype(type)>;
    if (n_chunks > 0) {
      const cudaError_t error = launch<join_chunks<T, Operation, counted>>(
          n_chunks, stream, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), numel, partials,
          rows, enabled);
      if (error) return error;
    }
    if (counted == Counted::kNone || n_chunks == 1) return cudaSuccess;
    Finisher<Wide<T>> finisher(partials, rows, enabled, stream);
    for (int row = 0; row < (counted == Counted::kBoth ? 2 : 1); ++row) finisher.add(row * n_chunks, n_chunks, row);
    return finisher.flush();
  });
}

template <typename Operation, Counted counted>
cudaError_t join_counting_if(const void* a, const void* b, void* out, int64_t numel, Element element, Stats* partials,
                             double* rows, const int32_t* enabled, cudaStream_t stream) {
  return rows == nullptr ? join<Operation, Counted::kNone>(a, b, out, numel, element, partials, rows, enabled, stream)
                         : join<Operation, counted>(a, b, out, numel, element, partials, rows, enabled, stream);
}

}  // namespace

cudaError_t residual_add(const void* x, const void* f, void* y, int64_t numel, Element element, bool relu,
                         Stats* partials, double* row, const int32_t* enabled, cudaStream_t stream) {
  const auto join = relu ? join_counting_if<AddRelu, Counted::kOutgoing> : join_counting_if<Add, Counted::kOutgoing>;
  return join(x, f, y, numel, element, partials, row, enabled, stream);
}

cudaError_t residual_add_backward(const void* grad_y, const void* y, void* grad_x, int64_t numel, Element element,
                                  Stats* partials, double* rows, const int32_t* enabled, cudaStream_t stream) {
  return join_counting_if<MaskGradient, Counted::kBoth>(grad_y, y, grad_x, numel, element, partials, rows, enabled,
                                                        stream);
}

}  // namespace gradprobe::cuda
