// Computes the total norm and the factor that clips it from the rows of all tensors, in one launch and without a
// synchronisation.
#include "cuda/device.cuh"

namespace gradprobe::cuda {
namespace {

// Runs as one block: even a large model has few rows, one per tensor.
__global__ void __launch_bounds__(kThreads)
    clip_rows(const double* rows, int64_t n_rows, double max_norm, double* out) {
  Stats mine = identity();
  for (int64_t k = threadIdx.x; k < n_rows; k += kThreads) mine = merge(mine, sums_of(rows + k * kStats));
  const Stats all = merge_block<double>(mine);
  if (threadIdx.x == 0) write_clip(all, max_norm, out);
}

}  // namespace

cudaError_t clip_coefficient(const double* rows, int64_t n_rows, double max_norm, double* out, cudaStream_t stream) {
  return launch<clip_rows>(1, stream, rows, n_rows, max_norm, out);
}

}  // namespace gradprobe::cuda
