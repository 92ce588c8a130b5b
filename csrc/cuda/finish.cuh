// The second launch: merges each row's partial results and writes the rows.
#pragma once

#include "cuda/device.cuh"

namespace gradprobe::cuda {
namespace {  // every file that includes this gets its own kernel

template <int kCapacity>
struct FinishTable {
  uint32_t first_partial[kCapacity];
  uint32_t n_partials[kCapacity];
  uint32_t row[kCapacity];
};

inline constexpr int kFinishRows = (kParameterBytes - 32) / 12;
inline constexpr int kFinishRowsSmall = 64;

constexpr int kPartialLoads = 4;  // loads in flight per thread

// One block per row. Threads stride over the partials with several loads in flight: a row may have 1e5 of them.
template <typename Number, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    merge_partials(const FinishTable<kCapacity> __grid_constant__ table, const Stats* partials, double* rows,
                   const int32_t* enabled) {
  if (!is_on(enabled)) return;
  const Stats* first = partials + table.first_partial[blockIdx.x];
  const int64_t n = table.n_partials[blockIdx.x];
  Stats mine = identity();
  int64_t i = threadIdx.x;
  for (; i + (kPartialLoads - 1) * kThreads < n; i += kPartialLoads * kThreads) {
    Stats loaded[kPartialLoads];
#pragma unroll
    for (int l = 0; l < kPartialLoads; ++l) loaded[l] = first[i + l * kThreads];
#pragma unroll
    for (int l = 0; l < kPartialLoads; ++l) mine = merge_of<Number>(mine, loaded[l]);
  }
  for (; i < n; i += kThreads) mine = merge_of<Number>(mine, first[i]);
  const Stats all = merge_block<Number>(mine);
  if (threadIdx.x == 0) finish(all, rows + int64_t{kStats} * table.row[blockIdx.x]);
}

// Collects the rows to merge, of elements that are computed in `Number`. The caller flushes it when full, after
// enqueuing the launches that write the partials.
template <typename Number>
class Finisher {
 public:
  Finisher(const Stats* partials, double* rows, const int32_t* enabled, cudaStream_t stream)
      : partials_(partials), rows_(rows), enabled_(enabled), stream_(stream) {}

  bool full() const { return n_rows_ == kFinishRows; }

  void add(int64_t first_partial, int64_t n_partials, int64_t row) {
    table_.first_partial[n_rows_] = static_cast<uint32_t>(first_partial);
    table_.n_partials[n_rows_] = static_cast<uint32_t>(n_partials);
    table_.row[n_rows_] = static_cast<uint32_t>(row);
    ++n_rows_;
  }

  cudaError_t flush() {
    if (n_rows_ == 0) return cudaSuccess;
    const int n_rows = n_rows_;
    n_rows_ = 0;
    if (n_rows > kFinishRowsSmall)
      return launch<merge_partials<Number, kFinishRows>>(n_rows, stream_, table_, partials_, rows_, enabled_);
    FinishTable<kFinishRowsSmall> small;
    for (int i = 0; i < n_rows; ++i) {
      small.first_partial[i] = table_.first_partial[i];
      small.n_partials[i] = table_.n_partials[i];
      small.row[i] = table_.row[i];
    }
    return launch<merge_partials<Number, kFinishRowsSmall>>(n_rows, stream_, small, partials_, rows_, enabled_);
  }

 private:
  FinishTable<kFinishRows> table_;
  int n_rows_ = 0;
  const Stats* partials_;
  double* rows_;
  const int32_t* enabled_;
  cudaStream_t stream_;
};

}  // namespace
}  // namespace gradprobe::cuda
