// The open step's rows of activations and residual adds on the CPU, in order of arrival. PythonEventRows in
// gradprobe/observers/event_rows.py does the same on any device.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "core/stats.h"
#include "cpu/parallel.h"
#include "hooks/event_log.h"
#include "hooks/known_rows.h"
#include "hooks/plain_tensor.h"

namespace gradprobe {

class EventRows final : public EventLog, public std::enable_shared_from_this<EventRows> {
 public:
  using EventLog::EventLog;

  // Returns the row of a new event. Rows never move, because another thread may still be writing to one. After `most`
  // events, every call returns the same row, which nobody reads.
  //
  // site: the number of the place where the statistics are taken, e.g. a module's output.
  double* next(int64_t site, int64_t numel, double smallest_normal) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (events_.size() >= most_) return unread_row_.data();
    if (events_.size() == rows_.size()) rows_.emplace_back();
    double* row = rows_[events_.size()].data();
    events_.push_back({site, numel, smallest_normal});
    return row;
  }

  // The same for a tensor of a dtype that the kernels support.
  double* next(int64_t site, const at::Tensor& tensor) {
    return next(site, tensor.numel(), smallest_normal(tensor.scalar_type()));
  }

  // The same as a tensor [1, 6].
  at::Tensor next_row(int64_t site, int64_t numel, double smallest_normal) {
    double* row = next(site, numel, smallest_normal);
    return at::from_blob(row, {1, kStats}, [alive = shared_from_this()](void*) {}, at::kDouble);
  }

  bool takes(const at::Tensor& tensor) const override {
    return is_plain(tensor) && measured_dtype_of(tensor).has_value();
  }

  bool write(int64_t site, const at::Tensor& tensor) override {
    if (const double* known = this->known(tensor)) {
      std::copy_n(known, kStats, next(site, tensor));
      return true;
    }
    cpu::Work work(1);
    if (!add_to(work, tensor)) return false;
    double* row = next(site, tensor);
    cpu::grad_stats(work, row);
    remember(tensor, row);
    return true;
  }

  // Returns the row of an earlier event of the same tensor; null if there is none or the tensor has changed since.
  const double* known(const at::Tensor& tensor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const double* const* row = known_.find(tensor);
    return row == nullptr ? nullptr : *row;
  }

  std::optional<at::Tensor> known_row(const at::Tensor& tensor) {
    const double* row = known(tensor);
    if (row == nullptr) return std::nullopt;
    at::Tensor copy = at::empty({1, kStats}, at::kDouble);
    std::copy_n(row, kStats, copy.mutable_data_ptr<double>());
    return copy;
  }

  void remember(const at::Tensor& tensor, const double* row) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (events_.size() < most_) known_.remember(tensor, row);  // else the row may be the one that nobody reads
  }

  Table events() {
    const auto [events, rows] = copies();
    return table_of(events, rows);
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    events_.clear();
    known_.clear();
  }

 private:
  std::pair<std::vector<Event>, at::Tensor> copies() {
    const std::lock_guard<std::mutex> lock(mutex_);
    at::Tensor rows = at::detail::empty_cpu({static_cast<int64_t>(events_.size()) + 1, kStats}, at::kDouble);
    auto* out = static_cast<double*>(rows.mutable_data_ptr());
    std::fill_n(out, kStats, 0.0);
    for (size_t k = 0; k < events_.size(); ++k) std::copy_n(rows_[k].data(), kStats, out += kStats);
    return {events_, rows};
  }

  std::array<double, kStats> unread_row_{};
  std::deque<std::array<double, kStats>> rows_;
  KnownRows<const double*> known_;
};

}  // namespace gradprobe
