// The table of a multi-tensor launch, passed in kernel parameters: there is no upload, no buffer to wait for or keep
// alive, and a captured CUDA graph has its own copy.
#pragma once

#include "cuda/device.cuh"

namespace gradprobe::cuda {

// 16 bytes per tensor; everything else about a tensor follows from these. A block works on one chunk of kChunkNumel
// elements, or on several if a tensor's chunks are larger (`chunk_numel`): such a tensor has a launch of its own.
template <int kCapacity>
struct TensorTable {
  const void* data[kCapacity];
  uint32_t first_chunk[kCapacity + 1];  // number of the tensor's first chunk within this launch
  uint16_t last_numel[kCapacity];       // elements of the tensor's last chunk, minus one
  uint16_t row[kCapacity];              // relative to the launch's first row
  int32_t n_tensors;
};

inline constexpr int kTensors = (kParameterBytes - 64) / 16;
inline constexpr int kTensorsMedium = kTensors < 512 ? kTensors : 512;
inline constexpr int kTensorsSmall = 128;

// Calls body with the smallest table that fits: most models then pass 2 or 8 KiB of parameters, not 32.
template <typename Body>
cudaError_t with_capacity(int64_t n_tensors, Body&& body) {
  if (n_tensors <= kTensorsSmall) return body(std::integral_constant<int, kTensorsSmall>{});
  if (n_tensors <= kTensorsMedium) return body(std::integral_constant<int, kTensorsMedium>{});
  return body(std::integral_constant<int, kTensors>{});
}

// The part of a tensor that a block works on.
template <typename T>
struct Piece {
  const T* begin;
  int numel;
  int64_t tensor;  // index in the table
  bool is_whole;   // the tensor has no other chunk
};

template <typename T, int kCapacity>
__device__ __forceinline__ Piece<T> find_piece(const TensorTable<kCapacity>& table, unsigned block) {
  const int64_t tensor = find_tensor(table.first_chunk, table.n_tensors, block);
  const int64_t first_chunk = table.first_chunk[tensor];
  const int64_t n_chunks = table.first_chunk[tensor + 1] - first_chunk;
  const int64_t numel = (n_chunks - 1) * kChunkNumel<T> + table.last_numel[tensor] + 1;
  const Chunk chunk = chunk_range(tensor, numel, first_chunk, block, chunk_numel<T>(numel));
  return {static_cast<const T*>(table.data[tensor]) + chunk.begin, static_cast<int>(chunk.end - chunk.begin), tensor,
          n_chunks == 1};
}

// Fills the table on the host. The caller launches and clears it when a tensor no longer fits.
template <typename T, int kCapacity>
class Packer {
 public:
  bool fits(const TensorSpan& tensor) const {
    const int64_t row_span = tensor.row - first_row_;
    const bool is_grown = n_blocks_ != n_chunks_ || chunk_numel<T>(tensor.numel) != kChunkNumel<T>;
    return table_.n_tensors == 0 || (table_.n_tensors < kCapacity && row_span >= 0 && row_span <= 0xffff && !is_grown);
  }

  // Adds a tensor that is not empty.
  void add(const TensorSpan& tensor) {
    if (table_.n_tensors == 0) first_row_ = tensor.row;
    const int at = table_.n_tensors++;
    table_.data[at] = tensor.data;
    table_.first_chunk[at] = static_cast<uint32_t>(n_chunks_);
    table_.last_numel[at] = static_cast<uint16_t>((tensor.numel - 1) % kChunkNumel<T>);
    table_.row[at] = static_cast<uint16_t>(tensor.row - first_row_);
    n_chunks_ += count_chunks(tensor.numel, kChunkNumel<T>);
    n_blocks_ += count_chunks(tensor.numel, chunk_numel<T>(tensor.numel));
    table_.first_chunk[table_.n_tensors] = static_cast<uint32_t>(n_chunks_);
  }

  void clear() {
    table_.n_tensors = 0;
    n_chunks_ = 0;
    n_blocks_ = 0;
  }

  const TensorTable<kCapacity>& table() const { return table_; }
  int64_t n_blocks() const { return n_blocks_; }
  int64_t first_row() const { return first_row_; }

 private:
  TensorTable<kCapacity> table_{};
  int64_t n_chunks_ = 0;  // of kChunkNumel
  int64_t n_blocks_ = 0;
  int64_t first_row_ = 0;
};

}  // namespace gradprobe::cuda
