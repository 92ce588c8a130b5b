#include "hooks/gradients.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "core/stats.h"
#include "cpu/parallel.h"
#include "hooks/plain_tensor.h"

namespace gradprobe {
namespace {

// Whether the gradient exists, is dense and is like its parameter when the hooks were made.
bool is_regular(const at::Tensor& gradient, const GradientSlot& slot) {
  return gradient.defined() && gradient.layout() == at::kStrided && !gradient.is_complex() &&
         gradient.scalar_type() == slot.dtype && gradient.device() == slot.device && gradient.numel() == slot.numel &&
         !gradient.unsafeGetTensorImpl()->is_python_dispatch();
}

// Whether `rows` can hold the raw rows of K tensors.
bool holds_rows(const at::Tensor& rows, int64_t n_tensors) {
  return rows.defined() && rows.layout() == at::kStrided && rows.device().is_cpu() &&
         rows.scalar_type() == at::kDouble && rows.is_contiguous() && rows.dim() == 2 && rows.size(0) == n_tensors &&
         rows.size(1) == kStats;
}

}  // namespace

bool grad_stats_into(const std::vector<at::Tensor>& tensors, const at::Tensor& out) {
  if (is_watched() || !holds_rows(out, static_cast<int64_t>(tensors.size())) || !is_plain(out)) return false;
  cpu::Work work(static_cast<int64_t>(tensors.size()));
  for (const at::Tensor& tensor : tensors) {
    if (!add_to(work, tensor)) return false;
  }
  py::gil_scoped_release no_gil;
  out.unsafeGetTensorImpl()->bump_version();
  cpu::grad_stats(work, static_cast<double*>(out.mutable_data_ptr()));
  return true;
}

std::tuple<bool, int64_t, int64_t> measure(GradientHooks& hooks, const std::optional<at::Tensor>& rows) {
  std::vector<GradientSlot>& slots = hooks.slots();
  bool is_measured = rows.has_value();
  int64_t n_writes = 0;
  int64_t n_fired = 0;
  const bool on_cpu = is_measured && rows->device().is_cpu();
  cpu::Work work(on_cpu ? static_cast<int64_t>(slots.size()) : 0);
  std::vector<at::Tensor> gradients;
  if (is_measured && !on_cpu) gradients.reserve(slots.size());
  {
    const auto held = hooks.lock();
    hooks.set_current();
    for (size_t k = 0; k < slots.size(); ++k) {
      GradientSlot& slot = slots[k];
      const at::Tensor& gradient = hooks.gradient(k);
      n_fired += slot.has_fired.load(std::memory_order_relaxed) ? 1 : 0;
      n_writes = std::max(n_writes, slot.n_writes(gradient));
      slot.see(GradientId::of(gradient));
      is_measured = is_measured && is_regular(gradient, slot) && gradient.device() == rows->device();
      if (!is_measured) continue;
      if (on_cpu) {
        is_measured = add_to(work, gradient);
      } else {
        gradients.push_back(gradient);
      }
    }
  }
  if (is_measured && on_cpu) {
    TORCH_CHECK(holds_rows(*rows, work.n_tensors()), "rows: needed a contiguous float64 tensor of shape [",
                work.n_tensors(), ", ", kStats, "], got ", rows->scalar_type(), " of shape ", rows->sizes());
    cpu::grad_stats(work, rows->mutable_data_ptr<double>());
  } else if (is_measured) {
    static const auto grad_stats_into = c10::Dispatcher::singleton()
                                            .findSchemaOrThrow("gradprobe::grad_stats_into", "")
                                            .typed<void(at::TensorList, at::Tensor&)>();
    at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor out = *rows;
    grad_stats_into.call(gradients, out);
  }
  return {is_measured, n_writes, n_fired};
}

std::pair<py::list, bool> list_gradients(const GradientHooks& hooks) {
  std::vector<at::Tensor> gradients(hooks.slots().size());
  bool regular = true;
  {
    const auto held = hooks.lock();
    for (size_t k = 0; k < gradients.size(); ++k) {
      gradients[k] = hooks.gradient(k);
      regular = regular && is_regular(gradients[k], hooks.slots()[k]);
    }
  }
  py::list result(gradients.size());
  for (size_t k = 0; k < gradients.size(); ++k) {
    result[k] = gradients[k].defined() ? py::cast(gradients[k]) : py::none();
  }
  return {std::move(result), regular};
}

py::list list_parameters(const GradientHooks& hooks) {
  py::list result;
  for (const at::Tensor& parameter : hooks.parameters()) {
    result.append(parameter.defined() ? py::cast(parameter) : py::none());
  }
  return result;
}

}  // namespace gradprobe
