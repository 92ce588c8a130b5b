// The events of the open step and what went wrong in measuring them. EventRows and DeviceEventRows add the rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/numpy.h>
#include <torch/csrc/Exceptions.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace gradprobe {

class EventLog {
 public:
  // most: events of a step. strict: errors of measuring are raised into the training.
  EventLog(size_t most, size_t n_sites, bool strict) : most_(most), strict_(strict), is_off_(n_sites) {}
  EventLog(const EventLog&) = delete;
  EventLog& operator=(const EventLog&) = delete;
  virtual ~EventLog() = default;

  std::atomic<bool> enabled{true};

  // Whether C++ may measure a tensor now.
  virtual bool takes(const at::Tensor& tensor) const = 0;

  // Whether a CUDA graph is being captured: its events are those of GraphRows in Python.
  virtual bool is_capturing() const { return false; }

  // Records the statistics of a tensor; reuses an earlier event of the same tensor if it has not changed since.
  // Returns false, and does nothing, if it does not take the tensor.
  virtual bool write(int64_t site, const at::Tensor& tensor) = 0;

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

  bool is_full() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return events_.size() >= most_;
  }

  int64_t n_events() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(events_.size());
  }

  static double smallest_normal(at::ScalarType dtype) {
    switch (dtype) {
      case at::kHalf:
        return std::numeric_limits<c10::Half>::min();
      case at::kBFloat16:
        return std::numeric_limits<c10::BFloat16>::min();
      case at::kFloat8_e4m3fn:
        return std::numeric_limits<c10::Float8_e4m3fn>::min();
      case at::kFloat8_e5m2:
        return std::numeric_limits<c10::Float8_e5m2>::min();
      case at::kFloat:
        return std::numeric_limits<float>::min();
      default:
        return std::numeric_limits<double>::min();
    }
  }

 protected:
  struct Event {
    int64_t site;
    int64_t numel;
    double smallest_normal;
  };

  // The sites, numels and smallest normal numbers of events, [N] each, and their rows [1 + N, 6] behind a row of zeros.
  using Table =
      std::tuple<pybind11::array_t<int64_t>, pybind11::array_t<int64_t>, pybind11::array_t<double>, at::Tensor>;

  // Creates Python objects, so it must not run under the lock.
  static Table table_of(const std::vector<Event>& events, const at::Tensor& rows) {
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

  const size_t most_;
  std::mutex mutex_;
  std::vector<Event> events_;

 private:
  void fail(int64_t site, int64_t n_sites, const char* message) {
    switch_off(site, n_sites);
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      errors_.emplace_back(site, message);
    } catch (const std::bad_alloc&) {  // the sites are off, and are listed as unmeasured
    }
  }

  const bool strict_;
  std::vector<std::atomic<bool>> is_off_;  // [S]
  std::vector<std::pair<int64_t, std::string>> errors_;
};

}  // namespace gradprobe
