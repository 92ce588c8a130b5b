// Residual adds in C++, observed or not, because in Python a hook takes longer than the statistics. Handles plain
// tensors in plain autograd and leaves everything else to gradprobe/observers/junctions.py.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wstringop-overflow"  // false positive of GCC 12 in torch's reference counts
#endif

#include "hooks/junction_hooks.h"

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "core/stats.h"
#include "hooks/event_rows.h"
#include "hooks/forward_passes.h"
#include "hooks/junction_call.h"
#include "hooks/residual_node.h"

namespace gradprobe {
namespace {

// Returns the operands of a residual add, unless Python has to handle them.
std::optional<std::pair<at::Tensor, at::Tensor>> operands(py::handle x, py::handle f) {
  const at::Tensor* of_x = exact_tensor(x);
  const at::Tensor* of_f = exact_tensor(f);
  if (of_x == nullptr || of_f == nullptr || !is_simple_pair(*of_x, *of_f) || !is_plain_execution()) return std::nullopt;
  return std::pair(*of_x, *of_f);
}

// Returns x + f, or max(x + f, 0); None, and does nothing, if the operator has to see the call.
std::optional<at::Tensor> add_outside_dispatcher(py::handle x, py::handle f, bool relu) {
  const auto pair = operands(x, f);
  if (!pair) return std::nullopt;
  return keeping_python_errors([&] { return residual_add(pair->first, pair->second, relu, nullptr, nullptr); });
}

// Observes J residual adds with kSites sites each.
class JunctionHooks {
 public:
  JunctionHooks(std::shared_ptr<EventRows> rows, int64_t n_junctions, int64_t first_site)
      : rows_(std::move(rows)), passes_(n_junctions), first_site_(first_site) {}

  // Computes and observes residual add j. Returns None, and does nothing, if Python has to handle the call or it is not
  // to be observed.
  std::optional<at::Tensor> join(int64_t j, py::handle x_object, py::handle f_object, bool relu) {
    const int64_t first = first_site_ + kSites * j;
    if (!rows_->enabled || !at::GradMode::is_enabled() || rows_->is_off(first) || rows_->is_full()) return std::nullopt;
    const auto pair = operands(x_object, f_object);
    if (!pair) return std::nullopt;
    const auto& [x, f] = *pair;
    const auto call = std::make_shared<JunctionCall>(rows_, first);
    double row[kStats];
    at::Tensor y = keeping_python_errors([&] { return residual_add(x, f, relu, row, call); });
    call->fence([&] {
      if (!passes_.is_repeat(j)) {
        const py::gil_scoped_release no_gil;
        rows_->write(first + kX, x);
        rows_->write(first + kF, f);
        call->put(kY, y, row);
      }
      if (x.requires_grad() && f.requires_grad()) follow_branch(call, x, y);
    });
    return y;
  }

  bool is_repeat(int64_t key) { return passes_.is_repeat(key); }

  void start_step() { passes_.clear(); }

 private:
  std::shared_ptr<EventRows> rows_;
  ForwardPasses passes_;
  int64_t first_site_;
};

}  // namespace

void define_junction_hooks(py::module_& module) {
  module.def("residual_add", &add_outside_dispatcher, py::arg("x"), py::arg("f"), py::arg("relu"));
  py::class_<JunctionHooks>(module, "JunctionHooks")
      .def(py::init<std::shared_ptr<EventRows>, int64_t, int64_t>(), py::arg("rows"), py::arg("n_junctions"),
           py::arg("first_site"))
      .def("join", &JunctionHooks::join, py::arg("j"), py::arg("x"), py::arg("f"), py::arg("relu"))
      .def("is_repeat", &JunctionHooks::is_repeat, py::arg("key"))
      .def("start_step", &JunctionHooks::start_step);
}

}  // namespace gradprobe
