// The table that maps a chunk number to a tensor and a range of its elements, for host and device.
//
// Tensors are cut into chunks of `chunk_numel` elements (the last of each may be shorter; an empty tensor has none),
// numbered through all tensors. The table holds the number of each tensor's first chunk, [n_tensors + 1], so a chunk
// finds its tensor by binary search.
#pragma once

#include <cstdint>

#include "core/stats.h"  // GRADPROBE_HD

namespace gradprobe {

struct Chunk {
  int64_t tensor;
  int64_t begin;  // first element
  int64_t end;    // one past the last
};

GRADPROBE_HD int64_t count_chunks(int64_t numel, int64_t chunk_numel) {
  return numel / chunk_numel + (numel % chunk_numel != 0);
}

// Fills first_chunk [n_tensors + 1] from numel [n_tensors]; returns the number of chunks of all tensors.
GRADPROBE_HD int64_t number_chunks(const int64_t* numel, int64_t n_tensors, int64_t chunk_numel, int64_t* first_chunk) {
  int64_t n_chunks = 0;
  for (int64_t k = 0; k < n_tensors; ++k) {
    first_chunk[k] = n_chunks;
    n_chunks += count_chunks(numel[k], chunk_numel);
  }
  first_chunk[n_tensors] = n_chunks;
  return n_chunks;
}

// The tensor that chunk number `chunk` belongs to: the last whose first chunk is not after it (so that empty ones are
// passed over).
template <typename Index>
GRADPROBE_HD int64_t find_tensor(const Index* first_chunk, int64_t n_tensors, int64_t chunk) {
  int64_t low = 0;
  int64_t high = n_tensors;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (static_cast<int64_t>(first_chunk[middle]) <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The range of chunk number `chunk` inside tensor `tensor` of `numel` elements, whose first chunk has number
// `first_chunk`.
GRADPROBE_HD Chunk chunk_range(int64_t tensor, int64_t numel, int64_t first_chunk, int64_t chunk, int64_t chunk_numel) {
  const int64_t begin = (chunk - first_chunk) * chunk_numel;
  const int64_t left = numel - begin;
  return {tensor, begin, begin + (left < chunk_numel ? left : chunk_numel)};
}

// Both in one: where chunk number `chunk` lies.
template <typename Index>
GRADPROBE_HD Chunk locate_chunk(const Index* first_chunk, const int64_t* numel, int64_t n_tensors, int64_t chunk_numel,
                                int64_t chunk) {
  const int64_t tensor = find_tensor(first_chunk, n_tensors, chunk);
  return chunk_range(tensor, numel[tensor], static_cast<int64_t>(first_chunk[tensor]), chunk, chunk_numel);
}

}  // namespace gradprobe
