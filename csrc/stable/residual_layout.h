// Checks the operands of the residual operators on any device: whether they match, and in which memory order the fused
// kernel may visit them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "core/layout.h"

namespace gradprobe {

template <typename Values>
bool equal(const Values& a, const Values& b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); ++d) {
    if (a[d] != b[d]) return false;
  }
  return true;
}

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::string text = "[";
  for (int64_t size : tensor.sizes()) {
    if (text.size() > 1) text.append(", ");
    text.append(std::to_string(size));
  }
  text.push_back(']');
  return text;
}

// Rejects operands of different dtypes or shapes. The error names the second one.
inline void check_alike(const torch::stable::Tensor& a, const torch::stable::Tensor& b, const char* name_a,
                        const char* name_b) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), name_b, ": needed the dtype of ", name_a, ", ",
                  torch::headeronly::toString(a.scalar_type()), ", got ", torch::headeronly::toString(b.scalar_type()));
  STD_TORCH_CHECK(equal(a.sizes(), b.sizes()), name_b, ": needed the shape of ", name_a, ", ", shape_of(a), ", got ",
                  shape_of(b));
}

// Requires a tensor that is not empty.
inline cpu::Dims dims_of(const torch::stable::Tensor& x) {
  return cpu::reduce_dims(x.sizes().data(), x.strides().data(), x.dim());
}

// Whether torch's add may treat the operand as channels-last, in which case it chooses the strides of dimensions of
// size 1 itself.
inline bool has_ambiguous_strides(const torch::stable::Tensor& x) {
  if (x.dim() != 4 && x.dim() != 5) return false;
  for (int64_t size : x.sizes()) {
    if (size == 1) return true;
  }
  return false;
}

// Allocates x + f with the strides that torch's add would give it, if that is dense and in the memory order of both
// operands. Returns nothing if torch has to compute the sum.
inline std::optional<torch::stable::Tensor> empty_sum(const torch::stable::Tensor& x, const torch::stable::Tensor& f) {
  if (x.numel() == 0) return std::nullopt;
  if (x.is_contiguous() && f.is_contiguous()) return torch::stable::new_empty(x, x.sizes());
  if (!equal(x.strides(), f.strides()) || has_ambiguous_strides(x)) return std::nullopt;
  if (!dims_of(x).dense()) return std::nullopt;
  return torch::stable::empty_like(x);
}

// Computes x + f, or max(x + f, 0), with torch's operators. The stable ABI has no add, so this subtracts -1 * f, which
// runs the same kernel.
inline torch::stable::Tensor sum_by_torch(const torch::stable::Tensor& x, const torch::stable::Tensor& f, bool relu) {
  torch::stable::Tensor sum = torch::stable::subtract(x, f, -1.0);
  if (!relu) return sum;
  std::array<StableIValue, 1> stack{torch::stable::detail::from(sum)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::relu", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// Returns `values` in the memory order of `like`, which is dense: a copy unless it has that order.
inline torch::stable::Tensor in_order_of(const torch::stable::Tensor& like, const torch::stable::Tensor& values) {
  if (equal(like.strides(), values.strides())) return values;
  torch::stable::Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, values);
  return copy;
}

// Whether the elements of x fill a flat range of memory, in any order.
inline bool is_dense(const torch::stable::Tensor& x) { return x.is_contiguous() || dims_of(x).dense(); }

}  // namespace gradprobe
