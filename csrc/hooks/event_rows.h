// The open step's rows of activations and residual adds, in order of arrival. PythonEventRows in
// gradprobe/observers/event_rows.py does the same on any device; this class keeps rows on the CPU.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/intrusive_ptr.h>
#include <pybind11/numpy.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "core/stats.h"
#include "cpu/parallel.h"
#include "hooks/plain_tensor.h"

namespace gradprobe {

class EventRows : public std::enable_shared_from_this<EventRows> {
 public:
  explicit EventRows(size_t most) : most_(most) {}

  std::atomic<bool> enabled{true};

  // Returns the row of a new event. Rows never move, because another thread may still be writing to one. After `most`
  // events, every call returns the same row, which nobody reads.
  //
  // site: the number of the place where the statistics are taken, e.g. a module's output.
  double* next(int64_t site, int64_t numel, double smallest_normal) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (sites_.size() >= most_) return unread_row_.data();
    if (sites_.size() == rows_.size()) rows_.emplace_back();
    double* row = rows_[sites_.size()].data();
    sites_.push_back(site);
    numels_.push_back(numel);
    smallest_normals_.push_back(smallest_normal);
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

  // Records the statistics of a tensor; reuses an earlier event of the same tensor if it has not changed since.
  // Returns false if the kernels do not support the tensor.
  bool write(int64_t site, const at::Tensor& tensor) {
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
    if (tensor.is_inference()) return nullptr;  // inference tensors have no version
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = known_.find(tensor.unsafeGetTensorImpl());
    if (found == known_.end() || found->second.version != tensor._version()) return nullptr;
    return found->second.row;
  }

  std::optional<at::Tensor> known_row(const at::Tensor& tensor) {
    const double* row = known(tensor);
    if (row == nullptr) return std::nullopt;
    at::Tensor copy = at::empty({1, kStats}, at::kDouble);
    std::copy_n(row, kStats, copy.mutable_data_ptr<double>());
    return copy;
  }

  void remember(const at::Tensor& tensor, const double* row) {
    if (tensor.is_inference() || tensor.layout() != at::kStrided) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (sites_.size() >= most_) return;  // the row may be the one that nobody reads
    // The weak reference keeps the address from being reused for another tensor.
    known_.insert_or_assign(tensor.unsafeGetTensorImpl(),
                            Known{Weak(tensor.getIntrusivePtr()), static_cast<uint32_t>(tensor._version()), row});
  }

  bool is_full() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return sites_.size() >= most_;
  }

  int64_t n_events() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(sites_.size());
  }

  // Returns the events' sites, numels and smallest normal numbers [N], and their rows [1 + N, 6] after a row of zeros.
  std::tuple<pybind11::array_t<int64_t>, pybind11::array_t<int64_t>, pybind11::array_t<double>, at::Tensor> events() {
    const auto [sites, numels, smallest_normals, rows] = copies();
    const auto array = [](const auto& values) {
      return pybind11::array_t(static_cast<pybind11::ssize_t>(values.size()), values.data());
    };
    return {array(sites), array(numels), array(smallest_normals), rows};
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    sites_.clear();
    numels_.clear();
    smallest_normals_.clear();
    known_.clear();
  }

 private:
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  struct Known {
    Weak tensor;
    uint32_t version;
    const double* row;
  };

  // Separate from events(), which creates Python objects and so must not hold the lock.
  std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<double>, at::Tensor> copies() {
    const std::lock_guard<std::mutex> lock(mutex_);
    at::Tensor rows = at::detail::empty_cpu({static_cast<int64_t>(sites_.size()) + 1, kStats}, at::kDouble);
    auto* out = static_cast<double*>(rows.mutable_data_ptr());
    std::fill_n(out, kStats, 0.0);
    for (size_t k = 0; k < sites_.size(); ++k) std::copy_n(rows_[k].data(), kStats, out += kStats);
    return {sites_, numels_, smallest_normals_, rows};
  }

  static double smallest_normal(at::ScalarType dtype) {
    switch (dtype) {
      case at::kHalf:
        return std::numeric_limits<c10::Half>::min();
      case at::kBFloat16:
        return std::numeric_limits<c10::BFloat16>::min();
      case at::kFloat:
        return std::numeric_limits<float>::min();
      default:
        return std::numeric_limits<double>::min();
    }
  }

  const size_t most_;  // events of a step
  std::array<double, kStats> unread_row_{};
  std::mutex mutex_;
  std::vector<int64_t> sites_;
  std::vector<int64_t> numels_;
  std::vector<double> smallest_normals_;
  std::deque<std::array<double, kStats>> rows_;
  std::unordered_map<const c10::TensorImpl*, Known> known_;
};

}  // namespace gradprobe
