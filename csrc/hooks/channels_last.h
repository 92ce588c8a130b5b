// Tensors whose channels are innermost in memory: matrices [n_rows, n_channels], a row for each position of each image.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include "core/layout.h"

namespace gradprobe {

// Whether a tensor, which must not be empty, is such a matrix.
inline bool is_matrix(const at::Tensor& tensor) {
  return cpu::has_channels_last(tensor.sizes().data(), tensor.strides().data(), tensor.dim());
}

// Returns `values` in the memory order of x, which is a matrix: a copy unless they have that order.
inline at::Tensor in_matrix_order(const at::Tensor& x, const at::Tensor& values) {
  if (is_matrix(values)) return values;
  const at::AutoDispatchBelowADInplaceOrView below;
  return at::empty_like(x).copy_(values);
}

inline at::Tensor empty_beside(const at::Tensor& x) {
  return at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type());
}

}  // namespace gradprobe
