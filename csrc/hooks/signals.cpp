// Taps on module outputs and residual junctions in C++: what Python does for a tensor that passes by takes longer than
// its statistics. They observe plain tensors in plain autograd; anything else they leave to their twins in
// gradprobe/activations.py and gradprobe/junctions.py.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wstringop-overflow"  // GCC 12 sees one in torch's reference counts
#endif

#include "hooks/signals.h"

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/residual_pass.h"
#include "hooks/event_rows.h"
#include "hooks/junction_call.h"
#include "hooks/plain_tensor.h"
#include "hooks/residual_node.h"

namespace gradprobe {
namespace {

// Whether operators run at once and for the sake of their results: no tracer, no transform of torch.func, no mode.
bool is_plain_execution() {
  return !is_watched() && !torch::jit::tracer::isTracing() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !autograd::ForwardADLevel::try_get_by_idx(0);
}

// The tensor of a Python object that is just a tensor, else null.
const at::Tensor* exact_tensor(py::handle object) {
  return THPVariable_CheckExact(object.ptr()) ? &THPVariable_Unpack(object.ptr()) : nullptr;
}

// Tells what a checkpoint computes again from what runs for the first time, as ForwardPasses in activations.py does.
class ForwardPasses {
 public:
  explicit ForwardPasses(int64_t n_keys) : n_first_(n_keys), n_in_backward_(n_keys) {}

  bool is_repeat(int64_t key) {
    if (autograd::get_current_graph_task_id() == -1) {
      ++n_first_[key];
      return false;
    }
    return ++n_in_backward_[key] <= n_first_[key];
  }

  void clear() {
    std::fill(n_first_.begin(), n_first_.end(), 0);
    std::fill(n_in_backward_.begin(), n_in_backward_.end(), 0);
  }

 private:
  std::vector<int64_t> n_first_;
  std::vector<int64_t> n_in_backward_;
};

// A hook on the gradient of an output of a node. Compiled autograd asks every hook for its arguments and refuses the
// graph without; ours take no part in it, and observe nothing of such a backward.
class GradientHook : public autograd::FunctionPreHook {
 public:
  explicit GradientHook(const at::Tensor& tensor) : output_nr(tensor.output_nr()) {}

  autograd::variable_list operator()(const autograd::variable_list& gradients) override {
    const at::Tensor& gradient = gradients[output_nr];
    if (gradient.defined()) look_at(gradient);
    return gradients;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& /*arguments*/) const override {}

  const uint32_t output_nr;

 protected:
  virtual void look_at(const at::Tensor& gradient) = 0;
};

// Whether a hook may be put on a tensor's node in its place among the others: hooks on a leaf outlive the graph, and
// those of Python, all in one, would run before ours even where they come later.
bool takes_hook(const at::Tensor& tensor) {
  if (tensor.is_leaf()) return false;
  const auto node = tensor.grad_fn();
  const auto& hooks = node->tensor_pre_hooks();
  return std::all_of(hooks.begin(), hooks.end(),
                     [](const auto& hook) { return dynamic_cast<const GradientHook*>(hook.get()) != nullptr; });
}

// Calls the Python twin for a gradient that is not plain.
class Twin {
 public:
  explicit Twin(py::object function) : function_(std::move(function)) {}
  Twin(const Twin&) = delete;
  Twin& operator=(const Twin&) = delete;
  ~Twin() {
    if (Py_IsInitialized() == 0) {  // a graph has outlived the interpreter
      function_.release();
      return;
    }
    const py::gil_scoped_acquire gil;
    function_ = py::object();
  }

  void operator()(int64_t site, const at::Tensor& gradient) const {
    const py::gil_scoped_acquire gil;
    function_(site, gradient);
  }

 private:
  py::object function_;
};

// Observes what M modules return: module m writes its output to site 2m, and the gradient of that to site 2m + 1.
class OutputHooks {
 public:
  OutputHooks(std::shared_ptr<EventRows> rows, int64_t n_modules, py::object on_gradient)
      : rows_(std::move(rows)), passes_(n_modules), twin_(std::make_shared<Twin>(std::move(on_gradient))) {}

  // False, and nothing done, where Python has to look at what module m returned; true where that is settled.
  bool observe(int64_t m, py::handle output) {
    if (!rows_->enabled || !at::GradMode::is_enabled()) return true;
    if (rows_->is_full()) return false;
    const at::Tensor* tensor = exact_tensor(output);
    if (tensor == nullptr || !is_plain(*tensor) || !dtype_of(*tensor) || !is_plain_execution()) return false;
    const bool has_gradient = tensor->requires_grad();
    if (has_gradient && !takes_hook(*tensor)) return false;
    if (!passes_.is_repeat(m)) {
      const py::gil_scoped_release no_gil;
      rows_->write(2 * m, *tensor);
    }
    if (has_gradient) observe_gradient(*tensor, 2 * m + 1);
    return true;
  }

  bool is_repeat(int64_t key) { return passes_.is_repeat(key); }

  void start_step() { passes_.clear(); }

 private:
  class Hook final : public GradientHook {
   public:
    Hook(const at::Tensor& tensor, std::shared_ptr<EventRows> rows, int64_t site, std::shared_ptr<Twin> twin)
        : GradientHook(tensor), rows_(std::move(rows)), site_(site), twin_(std::move(twin)) {}

    bool is_of(const at::Tensor& tensor, const std::shared_ptr<EventRows>& rows, int64_t site) const {
      return output_nr == tensor.output_nr() && rows_ == rows && site_ == site;
    }

   protected:
    void look_at(const at::Tensor& gradient) override {
      if (!rows_->enabled) return;
      if (!rows_->write(site_, gradient)) (*twin_)(site_, gradient);
    }

   private:
    std::shared_ptr<EventRows> rows_;
    int64_t site_;
    std::shared_ptr<Twin> twin_;
  };

  // One hook is enough where a module returns a tensor that it has returned before: its input, say.
  void observe_gradient(const at::Tensor& tensor, int64_t site) {
    const auto node = tensor.grad_fn();
    for (const auto& hook : node->tensor_pre_hooks()) {
      const auto* ours = dynamic_cast<const Hook*>(hook.get());
      if (ours != nullptr && ours->is_of(tensor, rows_, site)) return;
    }
    node->add_tensor_pre_hook(std::make_unique<Hook>(tensor, rows_, site, twin_));
  }

  std::shared_ptr<EventRows> rows_;
  ForwardPasses passes_;
  std::shared_ptr<Twin> twin_;
};

// The operands of a junction, if C++ may take them.
std::optional<std::pair<at::Tensor, at::Tensor>> operands(py::handle x, py::handle f) {
  const at::Tensor* of_x = exact_tensor(x);
  const at::Tensor* of_f = exact_tensor(f);
  if (of_x == nullptr || of_f == nullptr || !is_simple_pair(*of_x, *of_f) || !is_plain_execution()) return std::nullopt;
  return std::pair(*of_x, *of_f);
}

// Lets an exception that Python raised below autograd, as a checkpoint does to stop early, go on as it was.
template <typename Call>
auto keeping_python_errors(const Call& call) {
  try {
    return call();
  } catch (python_error& error) {
    error.restore();
    throw py::error_already_set();
  }
}

// x + f, or max(x + f, 0); None, and nothing done, where the operator has to see the call.
std::optional<at::Tensor> add_outside_dispatcher(py::handle x, py::handle f, bool relu) {
  const auto pair = operands(x, f);
  if (!pair) return std::nullopt;
  return keeping_python_errors([&] { return residual_add(pair->first, pair->second, relu, nullptr, nullptr); });
}

// Observes J junctions, with kSites sites each.
class JunctionHooks {
 public:
  JunctionHooks(std::shared_ptr<EventRows> rows, int64_t n_junctions, int64_t first_site)
      : rows_(std::move(rows)), passes_(n_junctions), first_site_(first_site) {}

  // Joins the operands of junction j and observes it; None, and nothing done, where Python has to see the call or the
  // call is not to be observed.
  std::optional<at::Tensor> join(int64_t j, py::handle x_object, py::handle f_object, bool relu) {
    if (!rows_->enabled || !at::GradMode::is_enabled() || rows_->is_full()) return std::nullopt;
    const auto pair = operands(x_object, f_object);
    if (!pair) return std::nullopt;
    const auto& [x, f] = *pair;
    const int64_t first = first_site_ + kSites * j;
    const auto passage = std::make_shared<JunctionCall>(rows_, first);
    double row[kStats];
    at::Tensor y = keeping_python_errors([&] { return residual_add(x, f, relu, row, passage); });
    if (!passes_.is_repeat(j)) {
      const py::gil_scoped_release no_gil;
      rows_->write(first + kX, x);
      rows_->write(first + kF, f);
      passage->put(kY, y, row);
    }
    if (x.requires_grad() && f.requires_grad()) follow_branch(passage, x, y);
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

void define_signals(py::module_& module) {
  module.def("residual_add", &add_outside_dispatcher, py::arg("x"), py::arg("f"), py::arg("relu"));
  py::class_<EventRows, std::shared_ptr<EventRows>>(module, "EventRows")
      .def(py::init<size_t>(), py::arg("most"))
      .def_property(
          "enabled", [](const EventRows& rows) { return rows.enabled.load(); },
          [](EventRows& rows, bool enabled) { rows.enabled = enabled; })
      .def_property_readonly("is_full", &EventRows::is_full)
      .def_property_readonly("n_events", &EventRows::n_events)
      .def("next", &EventRows::next_row, py::arg("site"), py::arg("numel"), py::arg("smallest_normal"))
      .def("known", &EventRows::known_row, py::arg("tensor"))
      .def(
          "remember",
          [](EventRows& rows, const at::Tensor& tensor, const at::Tensor& row) {
            rows.remember(tensor, row.const_data_ptr<double>());
          },
          py::arg("tensor"), py::arg("row"))
      .def("events", &EventRows::events)
      .def("clear", &EventRows::clear);
  py::class_<OutputHooks>(module, "OutputHooks")
      .def(py::init<std::shared_ptr<EventRows>, int64_t, py::object>(), py::arg("rows"), py::arg("n_modules"),
           py::arg("on_gradient"))
      .def("observe", &OutputHooks::observe, py::arg("m"), py::arg("output"))
      .def("is_repeat", &OutputHooks::is_repeat, py::arg("key"))
      .def("start_step", &OutputHooks::start_step);
  py::class_<JunctionHooks>(module, "JunctionHooks")
      .def(py::init<std::shared_ptr<EventRows>, int64_t, int64_t>(), py::arg("rows"), py::arg("n_junctions"),
           py::arg("first_site"))
      .def("join", &JunctionHooks::join, py::arg("j"), py::arg("x"), py::arg("f"), py::arg("relu"))
      .def("is_repeat", &JunctionHooks::is_repeat, py::arg("key"))
      .def("start_step", &JunctionHooks::start_step);
}

}  // namespace gradprobe
