// Hooks on module outputs and residual adds in C++, because in Python a hook takes longer than the statistics. They
// observe plain tensors in plain autograd and leave everything else to gradprobe/observers/activations.py and
// junctions.py.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wstringop-overflow"  // false positive of GCC 12 in torch's reference counts
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

// Whether operators simply run: no tracer, no torch.func transform, no forward-mode AD, no torch mode.
bool is_plain_execution() {
  return !is_watched() && !torch::jit::tracer::isTracing() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !autograd::ForwardADLevel::try_get_by_idx(0);
}

// Returns the tensor of a Python object that is exactly a torch.Tensor, else null.
const at::Tensor* exact_tensor(py::handle object) {
  return THPVariable_CheckExact(object.ptr()) ? &THPVariable_Unpack(object.ptr()) : nullptr;
}

// Tells a checkpoint's recomputation from a first forward, like ForwardPasses in observers/activations.py.
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

// A hook on the gradient of one output of a node. Compiled autograd rejects a graph with a hook that lacks
// compiled_args; ours take no part in it and observe nothing in such a backward.
class GradientHook : public autograd::FunctionPreHook {
 public:
  explicit GradientHook(const at::Tensor& tensor) : output_nr(tensor.output_nr()) {}

  autograd::variable_list operator()(const autograd::variable_list& gradients) override {
    const at::Tensor& gradient = gradients[output_nr];
    if (gradient.defined()) observe(gradient);
    return gradients;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& /*arguments*/) const override {}

  const uint32_t output_nr;

 protected:
  virtual void observe(const at::Tensor& gradient) = 0;
};

// Whether a hook may go on a tensor's node. Not on a leaf, whose hooks outlive the graph; and not after a Python hook,
// because torch runs all Python hooks as one, before ours even if they are added later.
bool takes_hook(const at::Tensor& tensor) {
  if (tensor.is_leaf()) return false;
  const auto node = tensor.grad_fn();
  const auto& hooks = node->tensor_pre_hooks();
  return std::all_of(hooks.begin(), hooks.end(),
                     [](const auto& hook) { return dynamic_cast<const GradientHook*>(hook.get()) != nullptr; });
}

// The Python function that handles a gradient that is not plain.
class PythonFallback {
 public:
  explicit PythonFallback(py::object function) : function_(std::move(function)) {}
  PythonFallback(const PythonFallback&) = delete;
  PythonFallback& operator=(const PythonFallback&) = delete;
  ~PythonFallback() {
    if (Py_IsInitialized() == 0) {  // a graph outlived the interpreter
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

// Observes the outputs of M modules: the output of module m is site 2m, its gradient site 2m + 1.
class OutputHooks {
 public:
  OutputHooks(std::shared_ptr<EventRows> rows, int64_t n_modules, py::object on_gradient)
      : rows_(std::move(rows)),
        passes_(n_modules),
        fallback_(std::make_shared<PythonFallback>(std::move(on_gradient))) {}

  // Observes the output of module m. Returns false, and does nothing, if Python has to handle it.
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
    Hook(const at::Tensor& tensor, std::shared_ptr<EventRows> rows, int64_t site,
         std::shared_ptr<PythonFallback> fallback)
        : GradientHook(tensor), rows_(std::move(rows)), site_(site), fallback_(std::move(fallback)) {}

    bool is_of(const at::Tensor& tensor, const std::shared_ptr<EventRows>& rows, int64_t site) const {
      return output_nr == tensor.output_nr() && rows_ == rows && site_ == site;
    }

   protected:
    void observe(const at::Tensor& gradient) override {
      if (!rows_->enabled) return;
      if (!rows_->write(site_, gradient)) (*fallback_)(site_, gradient);
    }

   private:
    std::shared_ptr<EventRows> rows_;
    int64_t site_;
    std::shared_ptr<PythonFallback> fallback_;
  };

  // Adds one hook only, even if a module returns the same tensor twice, e.g. its input.
  void observe_gradient(const at::Tensor& tensor, int64_t site) {
    const auto node = tensor.grad_fn();
    for (const auto& hook : node->tensor_pre_hooks()) {
      const auto* ours = dynamic_cast<const Hook*>(hook.get());
      if (ours != nullptr && ours->is_of(tensor, rows_, site)) return;
    }
    node->add_tensor_pre_hook(std::make_unique<Hook>(tensor, rows_, site, fallback_));
  }

  std::shared_ptr<EventRows> rows_;
  ForwardPasses passes_;
  std::shared_ptr<PythonFallback> fallback_;
};

// Returns the operands of a residual add, unless Python has to handle them.
std::optional<std::pair<at::Tensor, at::Tensor>> operands(py::handle x, py::handle f) {
  const at::Tensor* of_x = exact_tensor(x);
  const at::Tensor* of_f = exact_tensor(f);
  if (of_x == nullptr || of_f == nullptr || !is_simple_pair(*of_x, *of_f) || !is_plain_execution()) return std::nullopt;
  return std::pair(*of_x, *of_f);
}

// Passes on unchanged a Python exception from below autograd, such as the one with which a checkpoint stops early.
template <typename Call>
auto keeping_python_errors(const Call& call) {
  try {
    return call();
  } catch (python_error& error) {
    error.restore();
    throw py::error_already_set();
  }
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
    if (!rows_->enabled || !at::GradMode::is_enabled() || rows_->is_full()) return std::nullopt;
    const auto pair = operands(x_object, f_object);
    if (!pair) return std::nullopt;
    const auto& [x, f] = *pair;
    const int64_t first = first_site_ + kSites * j;
    const auto call = std::make_shared<JunctionCall>(rows_, first);
    double row[kStats];
    at::Tensor y = keeping_python_errors([&] { return residual_add(x, f, relu, row, call); });
    if (!passes_.is_repeat(j)) {
      const py::gil_scoped_release no_gil;
      rows_->write(first + kX, x);
      rows_->write(first + kF, f);
      call->put(kY, y, row);
    }
    if (x.requires_grad() && f.requires_grad()) follow_branch(call, x, y);
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
