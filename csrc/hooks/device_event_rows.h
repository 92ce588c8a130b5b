// The open step's rows on any device, written through torch's dispatcher and without waiting for the device. Does what
// PythonEventRows does, but without Python on the way of an event.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "core/stats.h"
#include "hooks/event_log.h"
#include "hooks/known_rows.h"
#include "hooks/plain_tensor.h"
#include "hooks/python_function.h"

namespace gradprobe {

class DeviceEventRows final : public EventLog {
 public:
  // is_capturing: a Python function that tells whether a graph is being captured on the device; None if there are no
  // graphs.
  DeviceEventRows(size_t most, size_t n_sites, bool strict, at::Device device, pybind11::object is_capturing)
      : EventLog(most, n_sites, strict), device_(device), is_capturing_(std::move(is_capturing)) {
    grow(kFirstRows);
  }

  bool is_capturing() const override { return !is_capturing_.is_none() && is_capturing_.operator()<bool>(); }

  bool takes(const at::Tensor& tensor) const override {
    return is_plain(tensor, device_) && measured_dtype_of(tensor).has_value() && !is_capturing();
  }

  bool write(int64_t site, const at::Tensor& tensor) override {
    if (!takes(tensor)) return false;
    const at::NoGradGuard no_grad;
    const std::optional<at::Tensor> known = this->known(tensor);
    const at::Tensor row = next(site, tensor.numel(), smallest_normal(tensor.scalar_type()));
    if (known) {
      row.copy_(*known, /*non_blocking=*/true);
      return true;
    }
    static const c10::OperatorHandle operation =
        c10::Dispatcher::singleton().findSchemaOrThrow("gradprobe::grad_stats_into", "");
    torch::jit::Stack stack{c10::List<at::Tensor>({tensor.detach()}), row};
    operation.callBoxed(stack);
    remember(tensor, row);
    return true;
  }

  // Returns the row [1, 6] of a new event. Rows never move, because another thread may still be writing to one. Once
  // there are `most` events, returns a row that nobody reads.
  at::Tensor next(int64_t site, int64_t numel, double smallest_normal) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (events_.size() >= most_) return at::empty_like(rows_.front());
    if (events_.size() + 1 == rows_.size()) grow(rows_.size());
    events_.push_back({site, numel, smallest_normal});
    return rows_[events_.size()];
  }

  std::optional<at::Tensor> known(const at::Tensor& tensor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const at::Tensor* row = known_.find(tensor);
    return row == nullptr ? std::nullopt : std::optional(*row);
  }

  void remember(const at::Tensor& tensor, const at::Tensor& row) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (events_.size() < most_) known_.remember(tensor, row);  // else the row may be one that nobody reads
  }

  Table events() {
    std::vector<Event> events;
    at::Tensor rows;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      events = events_;
      rows = blocks_.size() == 1 ? blocks_.front() : at::cat(blocks_);
    }
    return table_of(events, rows);
  }

  void clear() {
    KnownRows<at::Tensor> known;  // may free tensors that Python knows, which waits for the GIL: not under the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    events_.clear();
    std::swap(known_, known);
  }

 private:
  static constexpr size_t kFirstRows = 64;

  void grow(size_t n_rows) {
    // Rows made in inference mode could not be written to outside it.
    const c10::InferenceMode no_inference(false);
    const at::Tensor block =
        at::zeros({static_cast<int64_t>(n_rows), kStats}, at::TensorOptions().dtype(at::kDouble).device(device_));
    blocks_.push_back(block);
    for (const at::Tensor& row : block.unsqueeze(1).unbind()) rows_.push_back(row);
  }

  at::Device device_;
  PythonFunction is_capturing_;
  std::vector<at::Tensor> blocks_;  // [N, 6] each; the very first row stays zero
  std::vector<at::Tensor> rows_;    // views of the rows of all blocks, [1, 6] each
  KnownRows<at::Tensor> known_;
};

}  // namespace gradprobe
