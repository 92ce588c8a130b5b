// Simplifies the layout of a strided tensor for a reduction, which may visit the elements in any order: here, in that
// of memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace gradprobe::cpu {

// The dimensions of more than one element: sizes, and strides in elements. 63 of them would mean over 2**62 elements.
struct Dims {
  static constexpr int kMax = 64;
  int n = 0;
  int64_t size[kMax];
  int64_t stride[kMax];

  bool dense() const { return n == 0 || (n == 1 && stride[0] == 1); }

  // Whether two indices may share an element. Strides are in descending order; each must exceed the span of the smaller
  // ones.
  bool may_overlap() const {
    int64_t span = 0;
    for (int d = n - 1; d >= 0; --d) {
      if (stride[d] <= span) return true;
      span += stride[d] * (size[d] - 1);
    }
    return false;
  }
};

// Sorts the dimensions by descending stride and merges adjacent ones where possible: any permutation of dense memory
// becomes one dimension of stride 1. The tensor must not be empty.
inline Dims reduce_dims(const int64_t* sizes, const int64_t* strides, int64_t n_dims) {
  Dims sorted;
  for (int64_t d = 0; d < n_dims; ++d) {
    if (sizes[d] == 1) continue;
    int at = sorted.n++;
    for (; at > 0 && sorted.stride[at - 1] < strides[d]; --at) {
      sorted.size[at] = sorted.size[at - 1];
      sorted.stride[at] = sorted.stride[at - 1];
    }
    sorted.size[at] = sizes[d];
    sorted.stride[at] = strides[d];
  }
  Dims joined;
  for (int d = 0; d < sorted.n; ++d) {
    const int last = joined.n - 1;
    if (last >= 0 && joined.stride[last] == sorted.stride[d] * sorted.size[d]) {
      joined.size[last] *= sorted.size[d];
      joined.stride[last] = sorted.stride[d];
    } else {
      joined.size[joined.n] = sorted.size[d];
      joined.stride[joined.n++] = sorted.stride[d];
    }
  }
  return joined;
}

// Whether a tensor of at least two dimensions is a dense matrix in memory with dimension 1, the channels, innermost and
// the others in order: channels-last memory, or a contiguous [rows, channels]. The tensor must not be empty.
inline bool has_channels_last(const int64_t* sizes, const int64_t* strides, int64_t n_dims) {
  if (n_dims < 2) return false;
  int64_t expected = 1;
  const auto follows = [&](int64_t d) {
    const bool is_next = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return is_next;
  };
  if (!follows(1)) return false;
  for (int64_t d = n_dims - 1; d > 1; --d) {
    if (!follows(d)) return false;
  }
  return follows(0);
}

// Visits n elements from number `begin` on, in runs of constant stride: calls run(offset, stride, count) for each run.
template <typename Run>
void walk(const Dims& dims, int64_t begin, int64_t n, const Run& run) {
  int64_t index[Dims::kMax];
  int64_t offset = 0;
  int64_t rest = begin;
  for (int d = dims.n - 1; d >= 0; --d) {
    index[d] = rest % dims.size[d];
    rest /= dims.size[d];
    offset += index[d] * dims.stride[d];
  }
  const int inner = dims.n - 1;
  while (n > 0) {
    const int64_t count = std::min(n, dims.size[inner] - index[inner]);
    run(offset, dims.stride[inner], count);
    n -= count;
    index[inner] += count;
    offset += count * dims.stride[inner];
    for (int d = inner; d > 0 && index[d] == dims.size[d]; --d) {
      offset += dims.stride[d - 1] - dims.size[d] * dims.stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Copies n elements, from number `begin` on, to dense memory.
template <typename Word>
void gather(const Word* data, const Dims& dims, int64_t begin, int64_t n, Word* out) {
  walk(dims, begin, n, [&](int64_t offset, int64_t stride, int64_t count) {
    const Word* from = data + offset;
    if (stride == 1) {
      std::memcpy(out, from, count * sizeof(Word));
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = from[i * stride];
    }
    out += count;
  });
}

// Copies dense memory to n elements, from number `begin` on.
template <typename Word>
void scatter(const Word* in, const Dims& dims, int64_t begin, int64_t n, Word* data) {
  walk(dims, begin, n, [&](int64_t offset, int64_t stride, int64_t count) {
    Word* to = data + offset;
    for (int64_t i = 0; i < count; ++i) to[i * stride] = in[i];
    in += count;
  });
}

}  // namespace gradprobe::cpu
