// The six statistics of many tensors, each element read once.
//
// One block for each chunk (64 KiB) of each tensor. The table of tensors travels in the kernel's parameters: nothing is
// copied to the device, so there is no buffer to wait for or to keep alive, and a captured CUDA graph holds its own
// copy. A block finds its tensor by binary search in the numbers of first chunks, sums its chunk and writes the row if
// the tensor has no other chunk, otherwise a partial result that the second launch merges. No atomics: the order of
// every sum is fixed by the tensor's size and alignment.
#include "device.cuh"
#include "finish.cuh"

namespace gradprobe::cuda {
namespace {

// 16 bytes a tensor: what does not fit is told by what does.
template <int kCapacity>
struct TensorTable {
  const void* data[kCapacity];
  uint32_t first_chunk[kCapacity + 1];  // number of the tensor's first chunk within this launch
  uint16_t last_numel[kCapacity];       // elements of the tensor's last chunk, less one
  uint16_t row[kCapacity];              // less the launch's first row
  int32_t n_tensors;
};

constexpr int kTensors = (kParameterBytes - 64) / 16;
constexpr int kTensorsSmall = 128;  // small models pay for 2 KiB of parameters, not for 32

constexpr int kLoads = 4;  // 16-byte loads in flight for each thread

template <typename T>
__device__ __forceinline__ void add_range(ThreadSums<Wide<T>>& sums, const T* begin, int numel) {
  constexpr int kNumel = kVectorNumel<T>;
  constexpr int kGroup = kLoads * kNumel < kFastAdds ? kLoads * kNumel : kFastAdds;
  const Split split = split_range(begin, numel);
  const T* vectors = begin + split.head;
  const int thread = static_cast<int>(threadIdx.x);

  int v = thread;
  for (; v + (kLoads - 1) * kThreads < split.n_vectors; v += kLoads * kThreads) {
    Vector<T> loaded[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) loaded[l] = load_vector(vectors + (v + l * kThreads) * kNumel);
#pragma unroll
    for (int g = 0; g < kLoads * kNumel; g += kGroup) {
      Wide<T> group[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) group[i] = widened(loaded[(g + i) / kNumel].element[(g + i) % kNumel]);
      sums.add_group(group);
    }
  }
  for (; v < split.n_vectors; v += kThreads) {
    const Vector<T> loaded = load_vector(vectors + v * kNumel);
    Wide<T> group[kNumel];
#pragma unroll
    for (int i = 0; i < kNumel; ++i) group[i] = widened(loaded.element[i]);
    sums.add_group(group);
  }
  if (thread < split.head) {
    const Wide<T> single[1] = {widened(begin[thread])};
    sums.add_group(single);
  }
  if (thread < split.tail) {
    const Wide<T> single[1] = {widened(vectors[split.n_vectors * kNumel + thread])};
    sums.add_group(single);
  }
}

template <typename T, int kCapacity>
__global__ void __launch_bounds__(kThreads, 4)
    sum_chunks(const __grid_constant__ TensorTable<kCapacity> table, Stats* partials, double* rows) {
  const int64_t tensor = find_tensor(table.first_chunk, table.n_tensors, blockIdx.x);
  const int64_t first_chunk = table.first_chunk[tensor];
  const int64_t n_chunks = table.first_chunk[tensor + 1] - first_chunk;
  const int64_t numel = (n_chunks - 1) * kChunkNumel<T> + table.last_numel[tensor] + 1;
  const Chunk chunk = chunk_range(tensor, numel, first_chunk, blockIdx.x, kChunkNumel<T>);

  ThreadSums<Wide<T>> sums;
  add_range(sums, static_cast<const T*>(table.data[tensor]) + chunk.begin, static_cast<int>(chunk.end - chunk.begin));
  const Stats all = merge_block(sums.stats());
  if (threadIdx.x != 0) return;
  if (n_chunks == 1) {
    finish(all, rows + int64_t{kStats} * table.row[tensor]);
  } else {
    partials[blockIdx.x] = all;
  }
}

template <typename T, int kCapacity>
cudaError_t sum_tensors(const TensorSpan* tensors, int64_t n_tensors, Stats* partials, double* rows,
                        cudaStream_t stream) {
  Finisher finisher(partials, rows, stream);
  TensorTable<kCapacity> table;
  table.n_tensors = 0;
  int64_t first_row = 0;
  int64_t n_chunks = 0;     // of this launch
  int64_t chunks_done = 0;  // of the launches before

  const auto flush = [&]() -> cudaError_t {
    if (table.n_tensors == 0) return cudaSuccess;
    table.first_chunk[table.n_tensors] = static_cast<uint32_t>(n_chunks);
    const cudaError_t error =
        launch(sum_chunks<T, kCapacity>, n_chunks, stream, table, partials + chunks_done, rows + kStats * first_row);
    chunks_done += n_chunks;
    n_chunks = 0;
    table.n_tensors = 0;
    return error;
  };

  for (int64_t k = 0; k < n_tensors; ++k) {
    const TensorSpan& tensor = tensors[k];
    const int64_t chunks = count_chunks(tensor.numel, kChunkNumel<T>);
    if (chunks != 1) {
      if (finisher.full()) {
        if (const cudaError_t error = flush()) return error;
        if (const cudaError_t error = finisher.flush()) return error;
      }
      finisher.add(chunks_done + n_chunks, chunks, tensor.row);
    }
    if (chunks == 0) continue;
    const int64_t row_span = tensor.row - first_row;
    if (table.n_tensors == kCapacity || row_span < 0 || row_span > 0xffff || table.n_tensors == 0) {
      if (const cudaError_t error = flush()) return error;
      first_row = tensor.row;
    }
    const int at = table.n_tensors++;
    table.data[at] = tensor.data;
    table.first_chunk[at] = static_cast<uint32_t>(n_chunks);
    table.last_numel[at] = static_cast<uint16_t>((tensor.numel - 1) % kChunkNumel<T>);
    table.row[at] = static_cast<uint16_t>(tensor.row - first_row);
    n_chunks += chunks;
  }
  if (const cudaError_t error = flush()) return error;
  return finisher.flush();
}

}  // namespace

int64_t count_partials(int64_t numel, Element element) {
  const int64_t element_bytes = element == Element::f64 ? 8 : element == Element::f32 ? 4 : 2;
  return count_chunks(numel, kChunkBytes / element_bytes);
}

int64_t count_partials(const TensorSpan* tensors, int64_t n_tensors, Element element) {
  int64_t n = 0;
  for (int64_t k = 0; k < n_tensors; ++k) n += count_partials(tensors[k].numel, element);
  return n;
}

cudaError_t grad_stats(const TensorSpan* tensors, int64_t n_tensors, Element element, Stats* partials, double* rows,
                       cudaStream_t stream) {
  return with_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return n_tensors > kTensorsSmall ? sum_tensors<T, kTensors>(tensors, n_tensors, partials, rows, stream)
                                     : sum_tensors<T, kTensorsSmall>(tensors, n_tensors, partials, rows, stream);
  });
}

}  // namespace gradprobe::cuda
