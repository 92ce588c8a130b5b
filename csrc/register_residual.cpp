// The CPU implementations of the residual operators, registered with torch through its stable ABI: argument checks,
// the choice between the fused kernel and torch's own operators, torch's thread pool.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "chunks.h"
#include "cpu/float_env.h"
#include "cpu/kernels.h"
#include "cpu/residual_add.h"
#include "residual_layout.h"
#include "stats.h"

namespace gradprobe {
namespace {

using cpu::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype check_operands(const Tensor& a, const Tensor& b, const char* name_a, const char* name_b) {
  const Dtype dtype = dtype_of(a.get(), name_a);
  STD_TORCH_CHECK(a.is_cpu(), name_a, ": needed device cpu, got another");
  STD_TORCH_CHECK(b.is_cpu(), name_b, ": needed device cpu, that of ", name_a, ", got another");
  check_alike(a, b, name_a, name_b);
  return dtype;
}

template <typename Each>
void for_each_chunk(int64_t numel, const Each& each) {
  torch::stable::parallel_for(0, count_chunks(numel, cpu::kChunkNumel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const Chunk chunk = chunk_range(0, numel, 0, number, cpu::kChunkNumel);
      each(number, chunk);
    }
  });
}

// Merges the partial statistics of a tensor's chunks, of which there are `n_rows` sets side by side, into raw rows.
Tensor finish_rows(const Tensor& like, const std::vector<Stats>& partials, int64_t n_rows) {
  const cpu::FloatEnvironment environment;
  Tensor rows = torch::stable::new_empty(like, {n_rows, kStats}, ScalarType::Double);
  auto* row = static_cast<double*>(rows.mutable_data_ptr());  // [n_rows, kStats]
  for (int64_t k = 0; k < n_rows; ++k) {
    Stats stats = identity();
    for (size_t at = k; at < partials.size(); at += n_rows) stats = merge(stats, partials[at]);
    finish(stats, row + k * kStats);
  }
  return rows;
}

// y, and the partial statistics of its chunks where `partials` is not null.
Tensor join(const Tensor& x, const Tensor& f, bool relu, std::vector<Stats>* partials) {
  const Dtype dtype = check_operands(x, f, "x", "f");
  const int64_t numel = x.numel();
  const cpu::Isa isa = cpu::best_isa();
  if (partials != nullptr) partials->resize(count_chunks(numel, cpu::kChunkNumel));
  const std::optional<Tensor> out = empty_sum(x, f);
  if (!out) {
    const Tensor y = sum_by_torch(x, f, relu);
    if (partials != nullptr) {
      const void* data = y.const_data_ptr();
      for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
        const cpu::FloatEnvironment environment;
        (*partials)[number] = cpu::chunk_stats({data, dtype, numel, nullptr}, chunk.begin, chunk.end, isa);
      });
    }
    return y;
  }
  const void* of_x = x.const_data_ptr();
  const void* of_f = f.const_data_ptr();
  void* of_y = out->mutable_data_ptr();
  for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
    cpu::add_chunk(dtype, of_x, of_f, of_y, chunk.begin, chunk.end, relu, isa,
                   partials == nullptr ? nullptr : &(*partials)[number]);
  });
  return *out;
}

// grad_x, and the partial statistics of the chunks of grad_y and grad_x, in pairs, where `partials` is not null.
Tensor mask(const Tensor& grad_y, const std::optional<Tensor>& y, std::vector<Stats>* partials) {
  const Dtype dtype = y ? check_operands(grad_y, *y, "grad_y", "y") : dtype_of(grad_y.get(), "grad_y");
  const int64_t numel = grad_y.numel();
  const cpu::Isa isa = cpu::best_isa();
  if (partials != nullptr) partials->resize(2 * count_chunks(numel, cpu::kChunkNumel));
  Tensor grad_x = torch::stable::empty_like(y ? *y : grad_y);
  if (numel == 0) return grad_x;
  const Tensor incoming = in_order_of(grad_x, grad_y);
  const Tensor masking = y ? in_order_of(grad_x, *y) : incoming;
  const void* of_grad_y = incoming.const_data_ptr();
  const void* of_y = y ? masking.const_data_ptr() : nullptr;
  void* of_grad_x = grad_x.mutable_data_ptr();
  for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
    cpu::mask_chunk(dtype, of_grad_y, of_y, of_grad_x, chunk.begin, chunk.end, isa,
                    partials == nullptr ? nullptr : &(*partials)[2 * number]);
  });
  return grad_x;
}

// residual_add(Tensor x, Tensor f, bool relu) -> Tensor
Tensor residual_add(Tensor x, Tensor f, bool relu) { return join(x, f, relu, nullptr); }

// residual_add_(Tensor(a!) x, Tensor f, bool relu) -> ()
void residual_add_(Tensor x, Tensor f, bool relu) {
  const Dtype dtype = check_operands(x, f, "x", "f");
  if (x.numel() == 0) return;
  check_writable(x, "x");
  const Tensor added = unchanged_by(x, f);
  if (!is_dense(x)) {
    torch::stable::copy_(x, sum_by_torch(x, added, relu));
    return;
  }
  const Tensor in_order = in_order_of(x, added);
  const void* of_f = in_order.const_data_ptr();
  void* of_x = x.mutable_data_ptr();
  const cpu::Isa isa = cpu::best_isa();
  for_each_chunk(x.numel(), [&](int64_t, const Chunk& chunk) {
    cpu::add_chunk(dtype, of_x, of_f, of_x, chunk.begin, chunk.end, relu, isa, nullptr);
  });
}

// residual_add_backward(Tensor grad_y, Tensor y) -> Tensor
Tensor residual_add_backward(Tensor grad_y, Tensor y) { return mask(grad_y, y, nullptr); }

// residual_add_stats(Tensor x, Tensor f, bool relu) -> (Tensor y, Tensor rows)
std::tuple<Tensor, Tensor> residual_add_stats(Tensor x, Tensor f, bool relu) {
  std::vector<Stats> partials;
  Tensor y = join(x, f, relu, &partials);
  return {y, finish_rows(y, partials, 1)};
}

// residual_add_backward_stats(Tensor grad_y, Tensor? y) -> (Tensor grad_x, Tensor rows)
std::tuple<Tensor, Tensor> residual_add_backward_stats(Tensor grad_y, std::optional<Tensor> y) {
  std::vector<Stats> partials;
  Tensor grad_x = mask(grad_y, y, &partials);
  return {grad_x, finish_rows(grad_x, partials, 2)};
}

// residual_branch_stats(Tensor total, Tensor shortcut) -> Tensor rows
Tensor residual_branch_stats(Tensor total, Tensor shortcut) {
  const Dtype dtype = check_operands(total, shortcut, "total", "shortcut");
  const int64_t numel = total.numel();
  const cpu::Isa isa = cpu::best_isa();
  // One order of memory for both, without gaps; any will do.
  const Tensor dense = numel == 0 || is_dense(total) ? total : torch::stable::contiguous(total);
  const Tensor part = numel == 0 ? shortcut : in_order_of(dense, shortcut);
  const void* of_total = dense.const_data_ptr();
  const void* of_part = part.const_data_ptr();
  std::vector<Stats> partials(count_chunks(numel, cpu::kChunkNumel));
  std::vector<double> dots(partials.size());
  for_each_chunk(numel, [&](int64_t number, const Chunk& chunk) {
    const cpu::FloatEnvironment environment;
    partials[number] = cpu::branch_chunk(dtype, of_total, of_part, chunk.begin, chunk.end, isa, &dots[number]);
  });
  const cpu::FloatEnvironment environment;
  Stats stats = identity();
  Stats products = identity();
  for (size_t number = 0; number < partials.size(); ++number) {
    stats = merge(stats, partials[number]);
    products.sum += dots[number];
  }
  Tensor rows = torch::stable::new_empty(total, {2, kStats}, ScalarType::Double);
  auto* row = static_cast<double*>(rows.mutable_data_ptr());  // [2, kStats]
  finish(stats, row);
  finish(products, row + kStats);
  return rows;
}

}  // namespace
}  // namespace gradprobe

STABLE_TORCH_LIBRARY_IMPL(gradprobe, CPU, m) {
  m.impl("residual_add", TORCH_BOX(&gradprobe::residual_add));
  m.impl("residual_add_", TORCH_BOX(&gradprobe::residual_add_));
  m.impl("residual_add_backward", TORCH_BOX(&gradprobe::residual_add_backward));
  m.impl("residual_add_stats", TORCH_BOX(&gradprobe::residual_add_stats));
  m.impl("residual_add_backward_stats", TORCH_BOX(&gradprobe::residual_add_backward_stats));
  m.impl("residual_branch_stats", TORCH_BOX(&gradprobe::residual_branch_stats));
}
