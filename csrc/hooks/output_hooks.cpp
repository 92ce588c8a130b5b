// Hooks on module outputs in C++, because in Python a hook takes longer than the statistics. They observe plain tensors
// in plain autograd and leave everything else to gradprobe/observers/activations.py.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wstringop-overflow"  // false positive of GCC 12 in torch's reference counts
#endif

#include "hooks/output_hooks.h"

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "hooks/event_log.h"
#include "hooks/forward_passes.h"
#include "hooks/python_function.h"

namespace gradprobe {
namespace {

// A hook on the gradient of one output of a node. Compiled autograd rejects a graph with a hook that lacks
// compiled_args; ours take no part in it and observe nothing in such a backward pass.
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

// Observes the outputs of M modules: the output of module m is site 2m, its gradient site 2m + 1.
class OutputHooks {
 public:
  // on_gradient: handles a gradient that is not plain.
  OutputHooks(std::shared_ptr<EventLog> rows, int64_t n_modules, py::object on_gradient)
      : rows_(std::move(rows)),
        passes_(n_modules),
        fallback_(std::make_shared<PythonFunction>(std::move(on_gradient))) {}

  // Observes the output of module m. Returns false, and does nothing, if Python has to handle it.
  bool observe(int64_t m, py::handle output) {
    if (!at::GradMode::is_enabled()) return true;
    if (!rows_->enabled) return !rows_->is_capturing();
    if (rows_->is_full()) return false;
    const at::Tensor* tensor = exact_tensor(output);
    if (tensor == nullptr || !is_plain_execution() || !rows_->takes(*tensor)) return false;
    const bool has_gradient = tensor->requires_grad();
    if (has_gradient && !takes_hook(*tensor)) return false;
    if (!passes_.is_repeat(m)) {
      const py::gil_scoped_release no_gil;
      rows_->fence(2 * m, 1, [&] { rows_->write(2 * m, *tensor); });
    }
    if (has_gradient) rows_->fence(2 * m + 1, 1, [&] { observe_gradient(*tensor, 2 * m + 1); });
    return true;
  }

  bool is_repeat(int64_t key) { return passes_.is_repeat(key); }

  void start_step() { passes_.clear(); }

 private:
  class Hook final : public GradientHook {
   public:
    Hook(const at::Tensor& tensor, std::shared_ptr<EventLog> rows, int64_t site,
         std::shared_ptr<PythonFunction> fallback)
        : GradientHook(tensor), rows_(std::move(rows)), site_(site), fallback_(std::move(fallback)) {}

    bool is_of(const at::Tensor& tensor, const std::shared_ptr<EventLog>& rows, int64_t site) const {
      return output_nr == tensor.output_nr() && rows_ == rows && site_ == site;
    }

   protected:
    void observe(const at::Tensor& gradient) override {
      if (!rows_->enabled && !rows_->is_capturing()) return;
      rows_->fence(site_, 1, [&] {
        if (!rows_->write(site_, gradient)) (*fallback_)(site_, gradient);
      });
    }

   private:
    std::shared_ptr<EventLog> rows_;
    int64_t site_;
    std::shared_ptr<PythonFunction> fallback_;
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

  std::shared_ptr<EventLog> rows_;
  ForwardPasses passes_;
  std::shared_ptr<PythonFunction> fallback_;
};

}  // namespace

void define_output_hooks(py::module_& module) {
  py::class_<OutputHooks>(module, "OutputHooks")
      .def(py::init<std::shared_ptr<EventLog>, int64_t, py::object>(), py::arg("rows"), py::arg("n_modules"),
           py::arg("on_gradient"))
      .def("observe", &OutputHooks::observe, py::arg("m"), py::arg("output"))
      .def("is_repeat", &OutputHooks::is_repeat, py::arg("key"))
      .def("start_step", &OutputHooks::start_step);
}

}  // namespace gradprobe
