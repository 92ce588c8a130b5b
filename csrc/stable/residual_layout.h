// What both registrations of the residual operators ask about their operands, alike for every device: whether they
// match, and in which order of memory the fused kernel may walk them.
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

// Refuses operands of different dtypes or shapes; the second is the one to blame.
inline void check_alike(const torch::stable::Tensor& a, const torch::stable::Tensor& b, const char* name_a,
                        const char* name_b) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), name_b, ": needed the dtype of ", name_a, ", ",
                  torch::headeronly::toString(a.scalar_type()), ", got ", torch::headeronly::toString(b.scalar_type()));
  STD_TORCH_CHECK(equal(a.sizes(), b.sizes()), name_b, ": needed the shape of ", name_a, ", ", shape_of(a), ", got ",
                  shape_of(b));
}

// Only for tensors with elements.
inline cpu::Dims dims_of(const torch::stable::Tensor& x) {
  return cpu::reduce_dims(x.sizes().data(), x.strides().data(), x.dim());
}

// Whether torch's add might take the operand for channels-last, whose strides in dimensions of size 1 it makes itself.
inline bool has_ambiguous_strides(const torch::stable::Tensor& x) {
  if (x.dim() != 4 && x.dim() != 5) return false;
  for (int64_t size : x.sizes()) {
    if (size == 1) return true;
  }
  return false;
}

// Memory for x + f with the strides that torch's add gives it, where it is dense and in the order of both operands;
// none where the sum has to be left to torch.
inline std::optional<torch::stable::Tensor> empty_sum(const torch::stable::Tensor& x, const torch::stable::Tensor& f) {
  if (x.numel() == 0) return std::nullopt;
  if (x.is_contiguous() && f.is_contiguous()) return torch::stable::new_empty(x, x.sizes());
  if (!equal(x.strides(), f.strides()) || has_ambiguous_strides(x)) return std::nullopt;
  if (!dims_of(x).dense()) return std::nullopt;
  return torch::stable::empty_like(x);
}

// x + f or max(x + f, 0) by torch's own operators. The stable ABI has no add with its factor; subtracting minus f is
// the same kernel.
inline torch::stable::Tensor sum_by_torch(const torch::stable::Tensor& x, const torch::stable::Tensor& f, bool relu) {
  torch::stable::Tensor sum = torch::stable::subtract(x, f, -1.0);
  if (!relu) return sum;
  std::array<StableIValue, 1> stack{torch::stable::detail::from(sum)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::relu", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// A tensor with the values of `values` in the memory order of `like`, which is dense: itself where it has that order.
inline torch::stable::Tensor in_order_of(const torch::stable::Tensor& like, const torch::stable::Tensor& values) {
  if (equal(like.strides(), values.strides())) return values;
  torch::stable::Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, values);
  return copy;
}

// ---- In place

// Refuses to write to a tensor of which two indices may lie on the same element.
inline void check_writable(const torch::stable::Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous() || !dims_of(x).may_overlap(), name,
                  ": needed elements that do not overlap in memory, got a tensor expanded or folded onto itself");
}

// f, or a copy of it where writing to x might change elements of f that are still to be read: where both may share
// memory in another way than element for element.
inline torch::stable::Tensor unchanged_by(const torch::stable::Tensor& x, const torch::stable::Tensor& f) {
  const auto range = [](const torch::stable::Tensor& tensor) {
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    return std::array<uintptr_t, 2>{begin, begin + static_cast<uintptr_t>(last + 1) * tensor.element_size()};
  };
  const auto of_x = range(x), of_f = range(f);
  const bool apart = of_x[1] <= of_f[0] || of_f[1] <= of_x[0];
  if (apart || (of_x[0] == of_f[0] && equal(x.strides(), f.strides()))) return f;
  torch::stable::Tensor copy = torch::stable::empty_like(f);
  torch::stable::copy_(copy, f);
  return copy;
}

// Whether a fused kernel may write over x, walking it as flat memory.
inline bool is_dense(const torch::stable::Tensor& x) { return x.is_contiguous() || dims_of(x).dense(); }

}  // namespace gradprobe
