// Counts the elements of many tensors by magnitude, and sums their second and fourth powers.
//
// One block per chunk of a tensor, as in grad_stats.cu; a second launch merges the chunks of each tensor. Each warp
// counts in shared memory of its own. Its lanes meet there in atomic additions, of integers, so that their order does
// not matter; the order of every other sum depends only on the tensor's size and alignment.
#include "core/magnitudes.h"
#include "cuda/device.cuh"
#include "cuda/table.cuh"

namespace gradprobe::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;

struct ChunkMagnitudes {
  Moments moments;
  int32_t counts[kCounts];
};

__device__ int32_t* shared_counts() {
  __shared__ int32_t of_warp[kWarps * kCounts];
  return of_warp;
}

__device__ Moments* shared_moments() {
  __shared__ Moments of_thread[kThreads];
  return of_thread;
}

// Merges the moments of all threads of the block in a fixed order; every thread gets the result.
__device__ Moments merge_threads(const Moments& mine) {
  Moments* of_thread = shared_moments();
  const int thread = static_cast<int>(threadIdx.x);
  of_thread[thread] = mine;
  for (int n = kThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (thread < n) of_thread[thread] = merge(of_thread[thread], of_thread[thread + n]);
  }
  __syncthreads();
  return of_thread[0];
}

// Calls each(x) for the elements of a piece that this thread reads, widened to double.
template <typename T, typename Each>
__device__ __forceinline__ void for_each_element(const Piece<T>& piece, const Each& each) {
  constexpr int kNumel = kVectorNumel<T>;
  const Split split = split_range(piece.begin, piece.numel);
  const T* vectors = piece.begin + split.head;
  const int thread = static_cast<int>(threadIdx.x);
  for (int v = thread; v < split.n_vectors; v += kThreads) {
    const Vector<T> loaded = load_constant_vector(vectors + v * kNumel);
#pragma unroll
    for (int i = 0; i < kNumel; ++i) each(static_cast<double>(widened(loaded.element[i])));
  }
  if (thread < split.head) each(static_cast<double>(widened(piece.begin[thread])));
  if (thread < split.tail) each(static_cast<double>(widened(vectors[split.n_vectors * kNumel + thread])));
}

template <typename T, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    count_magnitudes(const TensorTable<kCapacity> __grid_constant__ table, ChunkMagnitudes* partials) {
  const Piece<T> piece = find_piece<T>(table, blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  int32_t* counts = shared_counts();
  for (int i = thread; i < kWarps * kCounts; i += kThreads) counts[i] = 0;
  __syncthreads();

  // In double, no fourth power of a float leaves the range, so that the scale need not be known first.
  constexpr bool kOnce = !std::is_same_v<T, double>;
  int32_t* of_warp = counts + thread / kWarp * kCounts;
  Moments mine{0.0, 0, 0.0, 0.0};
  int64_t largest = 0;
  for_each_element(piece, [&](double x) {
    const int64_t bits = abs_bits(x);
    atomicAdd(of_warp + column_of_bits(bits), 1);
    if (bits < kDoubleInfBits && bits > largest) largest = bits;
    if (kOnce) add(mine, x);
  });
  mine.largest = double_of_bits(largest);
  if (!kOnce) {
    mine.exponent = magnitude_exponent(mine.largest);
    const double unit = power_of_two(-mine.exponent);
    for_each_element(piece, [&](double x) { add(mine, x * unit); });
  }

  const Moments all = merge_threads(mine);  // after its barriers, all counts are there
  ChunkMagnitudes& partial = partials[blockIdx.x];
  for (int column = thread; column < kCounts; column += kThreads) {
    int32_t n = 0;
    for (int warp = 0; warp < kWarps; ++warp) n += counts[warp * kCounts + column];
    partial.counts[column] = n;
  }
  if (thread == 0) partial.moments = all;
}

// One block per tensor. n_chunks: of all tensors together; one with larger chunks has a launch of its own.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    merge_magnitudes(const TensorTable<kCapacity> __grid_constant__ table, int64_t n_chunks,
                     const ChunkMagnitudes* partials, double* rows) {
  const uint32_t first_chunk = table.first_chunk[blockIdx.x];
  if (table.n_tensors > 1) n_chunks = table.first_chunk[blockIdx.x + 1] - first_chunk;
  const ChunkMagnitudes* first = partials + first_chunk;
  double* row = rows + int64_t{kMagnitudeColumns} * table.row[blockIdx.x];
  for (int column = static_cast<int>(threadIdx.x); column < kCounts; column += kThreads) {
    int64_t n = 0;
#pragma unroll 4
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) n += first[chunk].counts[column];
    row[column] = static_cast<double>(n);
  }
  Moments mine = no_moments();
  for (int64_t chunk = threadIdx.x; chunk < n_chunks; chunk += kThreads) mine = merge(mine, first[chunk].moments);
  const Moments all = merge_threads(mine);
  if (threadIdx.x == 0) finish(all, row);
}

template <typename T, int kCapacity>
cudaError_t count_tensors(const TensorSpan* tensors, int64_t n_tensors, ChunkMagnitudes* partials, double* rows,
                          cudaStream_t stream) {
  Packer<T, kCapacity> packer;

  const auto flush = [&]() -> cudaError_t {
    if (packer.n_blocks() == 0) return cudaSuccess;
    cudaError_t error = launch<count_magnitudes<T, kCapacity>>(packer.n_blocks(), stream, packer.table(), partials);
    if (error == cudaSuccess) {
      error = launch<merge_magnitudes<kCapacity>>(packer.table().n_tensors, stream, packer.table(), packer.n_blocks(),
                                                  partials, rows + kMagnitudeColumns * packer.first_row());
    }
    partials += packer.n_blocks();
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

int64_t magnitude_bytes(const TensorSpan* tensors, int64_t n_tensors, Element element) {
  int64_t n_chunks = 0;
  for (int64_t k = 0; k < n_tensors; ++k) n_chunks += count_partials(tensors[k].numel, element);
  return n_chunks * static_cast<int64_t>(sizeof(ChunkMagnitudes));
}

cudaError_t magnitudes(const TensorSpan* tensors, int64_t n_tensors, Element element, void* scratch, double* rows,
                       cudaStream_t stream) {
  return with_measured_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_capacity(n_tensors, [&](auto capacity) {
      return count_tensors<T, capacity.value>(tensors, n_tensors, static_cast<ChunkMagnitudes*>(scratch), rows, stream);
    });
  });
}

}  // namespace gradprobe::cuda
