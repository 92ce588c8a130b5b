// The CUDA kernels as host functions, free of torch. Every function enqueues on `stream` and returns at once: no
// synchronisation and no allocation, so calls may be captured into a CUDA graph. Pointers are of the current device's
// memory.
//
// `enabled` is null, or points to a number on the device that a kernel reads when it runs: where it is 0, no statistics
// are taken and no row is written, at the cost of that one load. A CUDA graph that is replayed asks nothing else.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../core/stats.h"

namespace gradprobe::cuda {

enum class Element { f16, bf16, f32, f64 };

struct TensorSpan {
  const void* data;  // dense elements, aligned to their size
  int64_t numel;
  int64_t row;  // of the output that its statistics go to
};

// The number of Stats that the scratch space of a call needs; none where every tensor is of one chunk.
int64_t count_partials(const TensorSpan* tensors, int64_t n_tensors, Element element);
int64_t count_partials(int64_t numel, Element element);

// Writes the raw rows of `tensors` into rows [*, kStats]. One launch where every tensor is of one chunk, else two; more
// only beyond what a table in kernel parameters holds.
cudaError_t grad_stats(const TensorSpan* tensors, int64_t n_tensors, Element element, Stats* partials, double* rows,
                       const int32_t* enabled, cudaStream_t stream);

// Multiplies the tensors, which it writes to, by the one number that `coefficient` points to on the device. Reads and
// writes nothing where that is 1.
cudaError_t scale(const TensorSpan* tensors, int64_t n_tensors, Element element, const void* coefficient,
                  Element coefficient_element, cudaStream_t stream);

// y = x + f, or max(x + f, 0); the statistics of y go to row [kStats], unless that is null: then one launch, and no
// partials. y may be x or f.
cudaError_t residual_add(const void* x, const void* f, void* y, int64_t numel, Element element, bool relu,
                         Stats* partials, double* row, const int32_t* enabled, cudaStream_t stream);

// grad_x = grad_y where y > 0 (or y is NaN), else 0; rows [2, kStats], unless null, get the statistics of grad_y and of
// grad_x. grad_x may be grad_y.
cudaError_t residual_add_backward(const void* grad_y, const void* y, void* grad_x, int64_t numel, Element element,
                                  Stats* partials, double* rows, const int32_t* enabled, cudaStream_t stream);

// Rows [2, kStats]: the statistics of the branch's part of a gradient; and one with the sum of branch * shortcut in the
// place of the squares, beside a magnitude of which it has the range. Scratch space as for the gradient above.
cudaError_t branch_stats(const void* branch, const void* shortcut, int64_t numel, Element element, Stats* partials,
                         double* rows, const int32_t* enabled, cudaStream_t stream);

}  // namespace gradprobe::cuda
