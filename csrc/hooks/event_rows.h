// The open step's rows of activations and residual adds, in order of arrival. PythonEventRows in
// gradprobe/observers/event_rows.py does the same on any device; this class keeps rows on the CPU.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/intrusive_ptr.h>
#include <pybind11/numpy.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/stats.h"
#include "cpu/parallel.h"
#include "hooks/plain_tensor.h"

namespace gradprobe {

class EventRows : public std::enable_shared_from_this<EventRows> {
 public:
  // most: events of a step. strict: errors of measuring are raised into the training.
  EventRows(size_t most, size_t n_sites, bool strict) : most_(most), strict_(strict), is_off_(n_sites) {}

  std::atomic<bool> enabled{true};

  // Runs code that measures. An error in it switches off the `n_sites` sites from `site` on and is kept for Python to
  // report: the training goes on without their statistics.
  template <typename Measure>
  void fence(int64_t site, int64_t n_sites, const Measure& measure) {
    if (strict_) return measure();
    if (is_off(site)) return;
    try {
      measure();
    } catch (pybind11::error_already_set& error) {
      const pybind11::gil_scoped_acquire gil;
      if (!error.matches(PyExc_Exception)) throw;  // KeyboardInterrupt
      fail(site, n_sites, error.what());
    } catch (python_error& error) {
      const pybind11::gil_scoped_acquire gil;
      if (PyErr_GivenExceptionMatches(error.type, PyExc_Exception) == 0) throw;
      fail(site, n_sites, error.what());
    } catch (const std::exception& error) {
      fail(site, n_sites, error.what());
    } catch (...) {
      fail(site, n_sites, "an error of an unknown type");
    }
  }

  bool is_off(int64_t site) const { return is_off_.at(static_cast<size_t>(site)); }

  void switch_off(int64_t site, int64_t n_sites) {
    for (int64_t k = 0; k < n_sites; ++k) is_off_.at(static_cast<size_t>(site + k)) = true;
  }

  // Returns the sites that are switched off. Events there may lack rows or other events of the same step.
  std::vector<int64_t> off_sites() const {
    std::vector<int64_t> sites;
    for (size_t site = 0; site < is_off_.size(); ++site) {
      if (is_off_[site]) sites.push_back(static_cast<int64_t>(site));
    }
    return sites;
  }

  // Returns the errors since the last call: the first of the sites that each switched off, and what it says.
  std::vector<std::pair<int64_t, std::string>> take_errors() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(errors_, {});
  }

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
    if (events_.size() >= most_) return;  // the row may be the one that nobody reads
    // The weak reference keeps the address from being reused for another tensor.
    known_.insert_or_assign(tensor.unsafeGetTensorImpl(),
                            Known{Weak(tensor.getIntrusivePtr()), static_cast<uint32_t>(tensor._version()), row});
  }

  bool is_full() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return events_.size() >= most_;
  }

  int64_t n_events() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(events_.size());
  }

  // Returns the events' sites, numels and smallest normal numbers [N], and their rows [1 + N, 6] after a row of zeros.
  std::tuple<pybind11::array_t<int64_t>, pybind11::array_t<int64_t>, pybind11::array_t<double>, at::Tensor> events() {
    const auto [events, rows] = copies();
    const auto n_events = static_cast<pybind11::ssize_t>(events.size());
    pybind11::array_t<int64_t> sites(n_events);
    pybind11::array_t<int64_t> numels(n_events);
    pybind11::array_t<double> smallest_normals(n_events);
    for (pybind11::ssize_t k = 0; k < n_events; ++k) {
      const Event& event = events[static_cast<size_t>(k)];
      sites.mutable_at(k) = event.site;
      numels.mutable_at(k) = event.numel;
      smallest_normals.mutable_at(k) = event.smallest_normal;
    }
    return {sites, numels, smallest_normals, rows};
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    events_.clear();
    known_.clear();
  }

 private:
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  struct Event {
    int64_t site;
    int64_t numel;
    double smallest_normal;
  };

  struct Known {
    Weak tensor;
    uint32_t version;
    const double* row;
  };

  // Separate from events(), which creates Python objects and so must not hold the lock.
  std::pair<std::vector<Event>, at::Tensor> copies() {
    const std::lock_guard<std::mutex> lock(mutex_);
    at::Tensor rows = at::detail::empty_cpu({static_cast<int64_t>(events_.size()) + 1, kStats}, at::kDouble);
    auto* out = static_cast<double*>(rows.mutable_data_ptr());
    std::fill_n(out, kStats, 0.0);
    for (size_t k = 0; k < events_.size(); ++k) std::copy_n(rows_[k].data(), kStats, out += kStats);
    return {events_, rows};
  }

  void fail(int64_t site, int64_t n_sites, const char* message) {
    switch_off(site, n_sites);
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      errors_.emplace_back(site, message);
    } catch (const std::bad_alloc&) {  // the sites are off, and are listed as unmeasured
    }
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

  const size_t most_;
  const bool strict_;
  std::vector<std::atomic<bool>> is_off_;  // [S]
  std::array<double, kStats> unread_row_{};
  std::mutex mutex_;
  std::vector<Event> events_;
  std::vector<std::pair<int64_t, std::string>> errors_;
  std::deque<std::array<double, kStats>> rows_;
  std::unordered_map<const c10::TensorImpl*, Known> known_;
};

}  // namespace gradprobe
