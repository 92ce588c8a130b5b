// The CPU implementations of the residual operators: checks arguments, chooses between the fused kernel and torch's own
// operators, and registers with torch through its stable ABI.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "core/chunks.h"
#include "core/stats.h"
#include "cpu/float_env.h"
#include "cpu/kernels.h"
#include "cpu/residual_pass.h"
#include "stable/arguments.h"
#include "stable/residual_layout.h"

namespace gradprobe {
namespace {

using cpu::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype check_operands(const Tensor& a, const Tensor& b, const char* name_a, const char* name_b) {
  const Dtype dtype = dtype_of(a.get(), name_a);
  check_cpu(a, name_a);
  check_cpu(b, name_b);
  check_alike(a, b, name_a, name_b);
  return dtype;
}

// Returns the raw rows [n_rows, kStats] of a pass.
Tensor finish_rows(const Tensor& like, const cpu::Partials& partials, int64_t n_rows) {
  Tensor rows = torch::stable::new_empty(like, {n_rows, kStats}, ScalarType::Double);
  auto* row = static_cast<double*>(rows.mutable_data_ptr());  // [n_rows, kStats]
  for (int64_t k = 0; k < n_rows; ++k) partials.finish_row(k, row + k * kStats);
  return rows;
}

// Returns y, and writes its statistics unless `partials` is null.
Tensor join(const Tensor& x, const Tensor& f, bool relu, cpu::Partials* partials) {
  const Dtype dtype = check_operands(x, f, "x", "f");
  const int64_t numel = x.numel();
  const std::optional<Tensor> out = empty_sum(x, f);
  if (!out) {
    const Tensor y = sum_by_torch(x, f, relu);
    if (partials != nullptr) {
      const cpu::View view{y.const_data_ptr(), dtype, numel, nullptr};
      const cpu::Isa isa = cpu::best_isa();
      cpu::for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
        const cpu::FloatEnvironment environment;
        *partials->of_chunk(number) = cpu::chunk_stats(view, chunk.begin, chunk.end, isa);
      });
    }
    return y;
  }
  cpu::join(dtype, x.const_data_ptr(), f.const_data_ptr(), out->mutable_data_ptr(), numel, relu, partials);
  return *out;
}

// Returns grad_x, and writes the statistics of grad_y and grad_x unless `partials` is null.
Tensor mask(const Tensor& grad_y, const std::optional<Tensor>& y, cpu::Partials* partials) {
  const Dtype dtype = y ? check_operands(grad_y, *y, "grad_y", "y") : dtype_of(grad_y.get(), "grad_y");
  Tensor grad_x = torch::stable::empty_like(y ? *y : grad_y);
  if (grad_y.numel() == 0) return grad_x;
  const Tensor incoming = in_order_of(grad_x, grad_y);
  const Tensor masking = y ? in_order_of(grad_x, *y) : incoming;
  cpu::mask(dtype, incoming.const_data_ptr(), y ? masking.const_data_ptr() : nullptr, grad_x.mutable_data_ptr(),
            grad_y.numel(), partials);
  return grad_x;
}

// residual_add(Tensor x, Tensor f, bool relu) -> Tensor
Tensor residual_add(Tensor x, Tensor f, bool relu) { return join(x, f, relu, nullptr); }

// residual_add_backward(Tensor grad_y, Tensor y) -> Tensor
Tensor residual_add_backward(Tensor grad_y, Tensor y) { return mask(grad_y, y, nullptr); }

// residual_add_stats(Tensor x, Tensor f, bool relu) -> (Tensor y, Tensor rows)
std::tuple<Tensor, Tensor> residual_add_stats(Tensor x, Tensor f, bool relu) {
  cpu::Partials partials(x.numel(), 1);
  Tensor y = join(x, f, relu, &partials);
  return {y, finish_rows(y, partials, 1)};
}

// residual_add_backward_stats(Tensor grad_y, Tensor? y) -> (Tensor grad_x, Tensor rows)
std::tuple<Tensor, Tensor> residual_add_backward_stats(Tensor grad_y, std::optional<Tensor> y) {
  cpu::Partials partials(grad_y.numel(), 2);
  Tensor grad_x = mask(grad_y, y, &partials);
  return {grad_x, finish_rows(grad_x, partials, 2)};
}

// residual_branch_stats(Tensor branch, Tensor shortcut) -> Tensor rows
Tensor residual_branch_stats(Tensor branch, Tensor shortcut) {
  const Dtype dtype = check_operands(branch, shortcut, "branch", "shortcut");
  const int64_t numel = branch.numel();
  // Both operands need dense memory in the same order, whichever that is.
  const Tensor dense = numel == 0 || is_dense(branch) ? branch : torch::stable::contiguous(branch);
  const Tensor beside = numel == 0 ? shortcut : in_order_of(dense, shortcut);
  Tensor rows = torch::stable::new_empty(branch, {2, kStats}, ScalarType::Double);
  auto* row = static_cast<double*>(rows.mutable_data_ptr());  // [2, kStats]
  cpu::branch(dtype, dense.const_data_ptr(), beside.const_data_ptr(), numel, row, row + kStats);
  return rows;
}

}  // namespace
}  // namespace gradprobe

STABLE_TORCH_LIBRARY_IMPL(gradprobe, CPU, m) {
  m.impl("residual_add", TORCH_BOX(&gradprobe::residual_add));
  m.impl("residual_add_backward", TORCH_BOX(&gradprobe::residual_add_backward));
  m.impl("residual_add_stats", TORCH_BOX(&gradprobe::residual_add_stats));
  m.impl("residual_add_backward_stats", TORCH_BOX(&gradprobe::residual_add_backward_stats));
  m.impl("residual_branch_stats", TORCH_BOX(&gradprobe::residual_branch_stats));
}
