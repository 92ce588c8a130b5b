// The CPU implementations of gradprobe's multi-tensor operators: checks arguments, runs the kernels, and registers with
// torch through its stable ABI.
//
// These functions read the boxed stack directly: wrapping a thousand small tensors in shared pointers would take as
// long as their statistics.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "core/chunks.h"
#include "core/layout.h"
#include "cpu/float_env.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "stable/arguments.h"

namespace gradprobe {
namespace {

using cpu::Dims;
using cpu::Dtype;
using cpu::Work;

Work plan(const TensorList& tensors, bool writable) {
  static const int32_t kCpu = aoti_torch_device_type_cpu();
  static const int32_t kStrided = aoti_torch_layout_strided();
  const int64_t n_tensors = tensors.size();
  Work work(n_tensors);
  for (int64_t k = 0; k < n_tensors; ++k) {
    AtenTensorHandle tensor = tensors[k];
    int32_t device = 0;
    int32_t layout = 0;
    int64_t numel = 0;
    const Dtype dtype = dtype_of(tensor, "tensors", k, /*measures=*/!writable);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device));
    STD_TORCH_CHECK(device == kCpu, "tensors[", k, "]: needed device cpu, got device type number ", device);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
    STD_TORCH_CHECK(layout == kStrided, "tensors[", k, "]: needed a strided layout, got layout number ", layout);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &numel));
    if (numel == 0) {
      work.add(nullptr, dtype, 0);
      continue;
    }
    bool is_contiguous = false;
    Dims dims;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &is_contiguous));
    if (!is_contiguous) {
      dims = dims_of(tensor);
      STD_TORCH_CHECK(!writable || !dims.may_overlap(), "tensors[", k,
                      "]: needed elements that do not overlap in memory, got a tensor expanded or folded onto itself");
    }
    const void* data = nullptr;
    if (writable) {
      void* to_write = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &to_write));
      data = to_write;
    } else {
      STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &data));
    }
    work.add(data, dtype, numel, is_contiguous ? nullptr : &dims);
  }
  return work;
}

// For Work::for_each_chunk: keeps the caller's flush mode.
struct CallersEnvironment {
  CallersEnvironment() {}
};

// grad_stats_into(Tensor[] tensors, Tensor(a!) out) -> ()
void grad_stats_into(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  const auto out = torch::stable::detail::to<torch::stable::Tensor>(stack[1]);
  const int64_t n_tensors = tensors.size();
  check_cpu(out, "out");
  check_rows(out, n_tensors);
  // Like count_write(), but zeroes the whole of `out`, which is small: making a view would take four times as long.
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(out.get()));
  cpu::grad_stats(plan(tensors, /*writable=*/false), static_cast<double*>(out.mutable_data_ptr()));
}

// magnitudes_into(Tensor[] tensors, Tensor(a!) out) -> ()
void magnitudes_into(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  const auto out = torch::stable::detail::to<torch::stable::Tensor>(stack[1]);
  check_cpu(out, "out");
  check_rows(out, tensors.size(), "out", kMagnitudeColumns);
  count_write(out);
  cpu::magnitudes(plan(tensors, /*writable=*/false), static_cast<double*>(out.mutable_data_ptr()));
}

double coefficient_of(const torch::stable::Tensor& coefficient) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(coefficient.numel() == 1, "coefficient: needed one element, got ", coefficient.numel());
  check_cpu(coefficient, "coefficient");
  const ScalarType dtype = coefficient.scalar_type();
  if (dtype == ScalarType::Float) return *static_cast<const float*>(coefficient.const_data_ptr());
  STD_TORCH_CHECK(dtype == ScalarType::Double, "coefficient: needed dtype float32 or float64, got ",
                  torch::headeronly::toString(dtype));
  return *static_cast<const double*>(coefficient.const_data_ptr());
}

// scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()
void scale_(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  const double coefficient = coefficient_of(torch::stable::detail::to<torch::stable::Tensor>(stack[1]));
  const Work work = plan(tensors, /*writable=*/true);
  const cpu::Isa isa = cpu::best_isa();
  work.for_each_chunk<CallersEnvironment>([&](int64_t, const Chunk& chunk) {
    cpu::scale_chunk(work.views()[chunk.tensor], chunk.begin, chunk.end, coefficient, isa);
  });
}

// clip_coefficient(Tensor rows, float max_norm) -> Tensor
torch::stable::Tensor clip_coefficient(torch::stable::Tensor rows, double max_norm) {
  check_cpu(rows, "rows");
  check_rows(rows, rows.dim() > 0 ? rows.size(0) : 0, "rows");
  const torch::stable::Tensor out = torch::stable::new_empty(rows, {2});
  const auto* row = static_cast<const double*>(rows.const_data_ptr());  // [K, kStats]
  const cpu::FloatEnvironment with_subnormals;
  Stats all = identity();
  for (int64_t k = 0; k < rows.size(0); ++k) all = merge(all, sums_of(row + k * kStats));
  write_clip(all, max_norm, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace gradprobe

STABLE_TORCH_LIBRARY_IMPL(gradprobe, CPU, m) {
  m.impl("grad_stats_into", &gradprobe::grad_stats_into);
  m.impl("magnitudes_into", &gradprobe::magnitudes_into);
  m.impl("scale_", &gradprobe::scale_);
  m.impl("clip_coefficient", TORCH_BOX(&gradprobe::clip_coefficient));
}
