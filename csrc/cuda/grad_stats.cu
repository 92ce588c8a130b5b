// The six statistics of many tensors, reading each element once.
//
// One block per chunk of a tensor: 64 KiB, or more of a very large one. A block finds its tensor by binary search in
// the launch's table and sums its chunk. It writes the row if the tensor has no other chunk, else a partial result for
// the second launch to merge. There are no atomics: the order of every sum depends only on the tensor's size and
// alignment.
#include "cuda/finish.cuh"
#include "cuda/table.cuh"
#include "cuda/thread_sums.cuh"

namespace gradprobe::cuda {
namespace {

template <typename T>
__device__ __forceinline__ void add_range(ThreadSums<T>& sums, const T* begin, int numel) {
  constexpr int kNumel = kVectorNumel<T>;
  constexpr int kLoads = sizeof(T) == 1 ? 2 : 4;  // in flight per thread; two have as many elements as fast sums allow
  const Split split = split_range(begin, numel);
  const T* vectors = begin + split.head;
  const int thread = static_cast<int>(threadIdx.x);

  int v = thread;
  const T* at = vectors + v * kNumel;
  for (; v + (kLoads - 1) * kThreads < split.n_vectors; v += kLoads * kThreads, at += kLoads * kThreads * kNumel) {
    Vector<T> loaded[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) loaded[l] = load_constant_vector(at + l * kThreads * kNumel);
    sums.add(loaded);
  }
  for (; v < split.n_vectors; v += kThreads, at += kThreads * kNumel) {
    const Vector<T> loaded[1] = {load_constant_vector(at)};
    sums.add(loaded);
  }
  if (thread < split.head) sums.add(begin[thread]);
  if (thread < split.tail) sums.add(vectors[split.n_vectors * kNumel + thread]);
}

template <typename T, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sum_chunks(const TensorTable<kCapacity> __grid_constant__ table, Stats* partials, double* rows,
               const int32_t* enabled) {
  if (!is_on(enabled)) return;
  const Piece<T> piece = find_piece<T>(table, blockIdx.x);
  ThreadSums<T> sums;
  add_range(sums, piece.begin, piece.numel);
  const Stats all = merge_block<Wide<T>>(sums.stats());
  if (threadIdx.x != 0) return;
  if (piece.is_whole) {
    finish(all, rows + int64_t{kStats} * table.row[piece.tensor]);
  } else {
    partials[blockIdx.x] = all;
  }
}

template <typename T, int kCapacity>
cudaError_t sum_tensors(const TensorSpan* tensors, int64_t n_tensors, Stats* partials, double* rows,
                        const int32_t* enabled, cudaStream_t stream) {
  Finisher<Wide<T>> finisher(partials, rows, enabled, stream);
  Packer<T, kCapacity> packer;
  int64_t chunks_done = 0;  // by earlier launches

  const auto flush = [&]() -> cudaError_t {
    if (packer.n_blocks() == 0) return cudaSuccess;
    const cudaError_t error = launch<sum_chunks<T, kCapacity>>(
        packer.n_blocks(), stream, packer.table(), partials + chunks_done, rows + kStats * packer.first_row(), enabled);
    chunks_done += packer.n_blocks();
    packer.clear();
    return error;
  };

  for (int64_t k = 0; k < n_tensors; ++k) {
    const TensorSpan& tensor = tensors[k];
    const int64_t n_chunks = count_chunks(tensor.numel, chunk_numel<T>(tensor.numel));
    if (n_chunks != 1) {
      if (finisher.full()) {
        if (const cudaError_t error = flush()) return error;
        if (const cudaError_t error = finisher.flush()) return error;
      }
      finisher.add(chunks_done + packer.n_blocks(), n_chunks, tensor.row);
    }
    if (n_chunks == 0) continue;
    if (!packer.fits(tensor)) {
      if (const cudaError_t error = flush()) return error;
    }
    packer.add(tensor);
  }
  if (const cudaError_t error = flush()) return error;
  return finisher.flush();
}

}  // namespace

int64_t count_partials(int64_t numel, Element element) {
  return count_chunks(numel, grown_chunk(numel, kChunkBytes / kBytes[static_cast<int>(element)], kMaxChunks));
}

int64_t count_partials(const TensorSpan* tensors, int64_t n_tensors, Element element) {
  int64_t n = 0;
  bool any_merged = false;
  for (int64_t k = 0; k < n_tensors; ++k) {
    const int64_t n_chunks = count_partials(tensors[k].numel, element);
    n += n_chunks;
    any_merged |= n_chunks > 1;
  }
  return any_merged ? n : 0;
}

cudaError_t grad_stats(const TensorSpan* tensors, int64_t n_tensors, Element element, Stats* partials, double* rows,
                       const int32_t* enabled, cudaStream_t stream) {
  return with_measured_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_capacity(n_tensors, [&](auto capacity) {
      return sum_tensors<T, capacity.value>(tensors, n_tensors, partials, rows, enabled, stream);
    });
  });
}

}  // namespace gradprobe::cuda
