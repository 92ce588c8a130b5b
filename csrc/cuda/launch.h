// The CUDA kernels as host functions, without torch. Every function enqueues work on `stream` and returns: it neither
// synchronises nor allocates, so calls may be captured into a CUDA graph. Pointers are to the current device's memory.
//
// `enabled` is null or points to a flag on the device. If the flag is 0 when a kernel runs, the kernel takes no
// statistics and writes no row, at the cost of one load: the only way to skip them in a replayed CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/stats.h"

namespace gradprobe::cuda {

enum class Element { f16, bf16, f32, f64, e4m3, e5m2 };  // the last two can only be measured
inline constexpr int kElements = 6;
inline constexpr int64_t kBytes[kElements] = {2, 2, 4, 8, 1, 1};  // by Element

struct TensorSpan {
  const void* data;  // dense elements, aligned to their size
  int64_t numel;
  int64_t row;  // the output row of its statistics
};

// Returns the number of Stats in the scratch space of a call; 0 if no tensor has more than one chunk.
int64_t count_partials(const TensorSpan* tensors, int64_t n_tensors, Element element);
int64_t count_partials(int64_t numel, Element element);

// Writes the raw rows of `tensors` to rows [*, kStats]. One launch if every tensor has one chunk, else two; more if the
// tensors do not fit into one table in kernel parameters.
cudaError_t grad_stats(const TensorSpan* tensors, int64_t n_tensors, Element element, Stats* partials, double* rows,
                       const int32_t* enabled, cudaStream_t stream);

// Returns the bytes of scratch space of a call of `magnitudes`.
int64_t magnitude_bytes(const TensorSpan* tensors, int64_t n_tensors, Element element);

// Writes the rows of magnitudes of the tensors that are not empty to rows [*, kMagnitudeColumns]. Two launches; more if
// the tensors do not fit into one table in kernel parameters.
cudaError_t magnitudes(const TensorSpan* tensors, int64_t n_tensors, Element element, void* scratch, double* rows,
                       cudaStream_t stream);

// Multiplies the tensors in place by the number that `coefficient` points to on the device. Accesses no tensor if it
// is 1.
cudaError_t scale(const TensorSpan* tensors, int64_t n_tensors, Element element, const void* coefficient,
                  Element coefficient_element, cudaStream_t stream);

// Writes the total norm of the tensors with these raw rows [n_rows, kStats], and the factor that clips it, to out [2].
cudaError_t clip_coefficient(const double* rows, int64_t n_rows, double max_norm, double* out, cudaStream_t stream);

// Computes y = x + f, or max(x + f, 0), and writes the statistics of y to row [kStats]. If row is null, it takes one
// launch and no partials. y may be x or f.
cudaError_t residual_add(const void* x, const void* f, void* y, int64_t numel, Element element, bool relu,
                         Stats* partials, double* row, const int32_t* enabled, cudaStream_t stream);

// Computes grad_x: grad_y where y > 0 or y is NaN, else 0. Writes the statistics of grad_y and grad_x to rows [2,
// kStats] unless that is null. grad_x may be grad_y.
cudaError_t residual_add_backward(const void* grad_y, const void* y, void* grad_x, int64_t numel, Element element,
                                  Stats* partials, double* rows, const int32_t* enabled, cudaStream_t stream);

// Writes rows [2, kStats]: the statistics of the branch's part of a gradient, and a row with the sum of branch *
// shortcut in the column of squares, whose abs_max says how the sum is scaled. Scratch space as in
// residual_add_backward.
cudaError_t branch_stats(const void* branch, const void* shortcut, int64_t numel, Element element, Stats* partials,
                         double* rows, const int32_t* enabled, cudaStream_t stream);

}  // namespace gradprobe::cuda
