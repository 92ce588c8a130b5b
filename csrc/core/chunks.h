// Maps a chunk number to a tensor and a range of its elements, on host and device.
//
// Each tensor is split into chunks of `chunk_numel` elements; its last chunk may be shorter, and an empty tensor has
// none. Chunks are numbered across all tensors. A table first_chunk [n_tensors + 1] holds the number of each tensor's
// first chunk, in which a binary search finds the tensor of a chunk.
#pragma once

#include <cstdint>

#include "core/stats.h"  // GRADPROBE_HD

namespace gradprobe {

struct Chunk {
  int64_t tensor;
  int64_t begin;  // first element
  int64_t end;    // one past the last element
};

GRADPROBE_HD int64_t count_chunks(int64_t numel, int64_t chunk_numel) {
  return numel / chunk_numel + (numel % chunk_numel != 0);
}

// Returns `chunk_numel`, doubled until a tensor of `numel` elements has at most `max_chunks`.
GRADPROBE_HD int64_t grown_chunk(int64_t numel, int64_t chunk_numel, int64_t max_chunks) {
  while (chunk_numel * max_chunks < numel) chunk_numel *= 2;
  return chunk_numel;
}

// Fills first_chunk [n_tensors + 1] from numel [n_tensors]; returns the total number of chunks.
GRADPROBE_HD int64_t number_chunks(const int64_t* numel, int64_t n_tensors, int64_t chunk_numel, int64_t* first_chunk) {
  int64_t n_chunks = 0;
  for (int64_t k = 0; k < n_tensors; ++k) {
    first_chunk[k] = n_chunks;
    n_chunks += count_chunks(numel[k], chunk_numel);
  }
  first_chunk[n_tensors] = n_chunks;
  return n_chunks;
}

// Returns the tensor that chunk number `chunk` belongs to: the last one whose first chunk is not after it, which skips
// empty tensors.
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

// Returns the range of chunk number `chunk` in tensor `tensor`, which has `numel` elements and first chunk
// `first_chunk`.
GRADPROBE_HD Chunk chunk_range(int64_t tensor, int64_t numel, int64_t first_chunk, int64_t chunk, int64_t chunk_numel) {
  const int64_t begin = (chunk - first_chunk) * chunk_numel;
  const int64_t left = numel - begin;
  return {tensor, begin, begin + (left < chunk_numel ? left : chunk_numel)};
}

}  // namespace gradprobe
