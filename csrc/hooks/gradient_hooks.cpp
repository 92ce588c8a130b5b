// Autograd hooks in C++: they note, for every parameter, that its gradient is ready, and call back once per backward.
// Built against one exact torch: the hook classes are not part of the stable ABI.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "core/stats.h"
#include "cpu/parallel.h"
#include "hooks/plain_tensor.h"
#include "hooks/signals.h"

namespace gradprobe {
namespace {

namespace autograd = torch::autograd;
using Accumulator = decltype(autograd::impl::grad_accumulator(std::declval<const at::Tensor&>()));

// What a hook saw: which tensor held the gradient, and at which version.
struct Sighting {
  const void* gradient = nullptr;
  uint32_t version = 0;
};

Sighting sighting_of(const at::Tensor& gradient) {
  if (!gradient.defined()) return {};
  return {gradient.unsafeGetTensorImpl(), static_cast<uint32_t>(gradient._version())};
}

// Whether there is a gradient, dense and of its parameter's dtype and device.
bool is_regular(const at::Tensor& gradient, const at::Tensor& parameter) {
  return gradient.defined() && gradient.layout() == at::kStrided && !gradient.is_complex() &&
         gradient.scalar_type() == parameter.scalar_type() && gradient.device() == parameter.device() &&
         !gradient.unsafeGetTensorImpl()->is_python_dispatch();
}

// Whether `rows` can take the raw rows of K tensors.
bool takes_rows(const at::Tensor& rows, int64_t n_tensors) {
  return rows.defined() && rows.layout() == at::kStrided && rows.device().is_cpu() &&
         rows.scalar_type() == at::kDouble && rows.is_contiguous() && rows.dim() == 2 && rows.size(0) == n_tensors &&
         rows.size(1) == kStats;
}

// gradprobe::grad_stats_into for plain tensors on the CPU, called as a function: going through the dispatcher takes
// longer than the statistics of a small tensor. False, and nothing written, where that operator has to see the call.
bool grad_stats_into(const std::vector<at::Tensor>& tensors, const at::Tensor& out) {
  if (is_watched() || !takes_rows(out, static_cast<int64_t>(tensors.size())) || !is_plain(out)) return false;
  cpu::Work work(static_cast<int64_t>(tensors.size()));
  for (const at::Tensor& tensor : tensors) {
    if (!add_to(work, tensor)) return false;
  }
  py::gil_scoped_release no_gil;
  out.unsafeGetTensorImpl()->bump_version();
  cpu::grad_stats(work, static_cast<double*>(out.mutable_data_ptr()));
  return true;
}

// Outlives the taps when a graph still holds an accumulator; holds no parameter, so that no cycle keeps a model alive.
struct State {
  explicit State(size_t n_parameters) : sightings(n_parameters) {}

  std::vector<Sighting> sightings;  // [K]; one writer each: the engine runs an accumulator once at a time
  std::atomic<bool> enabled{true};
  std::atomic<bool> has_fired{false};  // whether enabled or not
  std::atomic<int> queued_task{-1};    // graph task whose end is already awaited; a failed backward leaves a stale id
  py::object on_backward_end;          // null once removed, so that the last owner may let go without the GIL
};

void notify(const std::shared_ptr<State>& state) {
  state->queued_task.store(-1);
  if (!state->enabled.load()) return;
  py::gil_scoped_acquire gil;
  if (state->on_backward_end) state->on_backward_end();
}

class ReadyHook final : public autograd::FunctionPostHook {
 public:
  ReadyHook(std::shared_ptr<State> state, size_t index, autograd::Node* accumulator, bool notifies)
      : state_(std::move(state)), index_(index), accumulator_(accumulator), notifies_(notifies) {}

  autograd::variable_list operator()(const autograd::variable_list& outputs,
                                     const autograd::variable_list& /*inputs*/) override {
    state_->has_fired.store(true, std::memory_order_relaxed);
    if (!state_->enabled.load(std::memory_order_relaxed)) return outputs;
    const at::Tensor& gradient = static_cast<autograd::AccumulateGrad*>(accumulator_)->variable.grad();
    state_->sightings[index_] = sighting_of(gradient);
    if (notifies_) {
      const int task = autograd::get_current_graph_task_id();
      if (state_->queued_task.exchange(task) != task) {
        autograd::Engine::get_default_engine().queue_callback([state = state_] { notify(state); });
      }
    }
    return outputs;
  }

  // Compiled autograd asks every hook for its arguments and refuses the graph without; ours take no part in it.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& /*args*/) const override {}

 private:
  std::shared_ptr<State> state_;
  size_t index_;
  autograd::Node* accumulator_;  // owns this hook
  bool notifies_;
};

// The parameters with their accumulators, which keep the nodes and with them the hooks alive.
class Arms : public std::enable_shared_from_this<Arms> {
 public:
  Arms(std::vector<at::Tensor> parameters, std::shared_ptr<State> state, bool notifies)
      : parameters_(std::move(parameters)),
        accumulators_(parameters_.size()),
        keys_(parameters_.size(), 0),
        state_(std::move(state)),
        notifies_(notifies) {}

  const std::vector<at::Tensor>& parameters() const { return parameters_; }

  // A conversion such as model.cuda() gives a parameter a new accumulator, without the hook. A hook on the tensor
  // itself stays; it runs just before the accumulator and puts things right.
  void watch() {
    for (size_t k = 0; k < parameters_.size(); ++k) {
      arm(k);
      // add_hook takes only a tensor without hooks
      autograd::impl::hooks(parameters_[k]).push_back(std::make_unique<Watcher>(this, weak_from_this(), k));
    }
    converted_.store(0);
  }

  void arm(size_t k) {
    if (!parameters_[k].requires_grad()) return;
    Accumulator current = autograd::impl::grad_accumulator(parameters_[k]);
    if (current == accumulators_[k]) return;
    unhook(k);
    keys_[k] = current->add_post_hook(std::make_unique<ReadyHook>(state_, k, current.get(), notifies_));
    accumulators_[k] = std::move(current);
    converted_.fetch_add(1);
  }

  int64_t take_converted() { return converted_.exchange(0); }

  void release() {
    for (const at::Tensor& parameter : parameters_) {
      std::erase_if(autograd::impl::hooks(parameter), [this](const auto& hook) {
        const auto* watcher = dynamic_cast<const Watcher*>(hook.get());
        return watcher != nullptr && watcher->owner == this;
      });
    }
    for (size_t k = 0; k < parameters_.size(); ++k) unhook(k);
  }

 private:
  struct Watcher final : autograd::FunctionPreHook {
    Watcher(const Arms* owner, std::weak_ptr<Arms> arms, size_t index)
        : owner(owner), arms(std::move(arms)), index(index) {}

    autograd::variable_list operator()(const autograd::variable_list& gradients) override {
      if (const std::shared_ptr<Arms> alive = arms.lock()) alive->arm(index);
      return gradients;
    }

    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& /*args*/) const override {}

    const Arms* owner;
    std::weak_ptr<Arms> arms;
    size_t index;
  };

  void unhook(size_t k) {
    if (!accumulators_[k]) return;
    accumulators_[k]->del_post_hook(keys_[k]);
    accumulators_[k] = Accumulator();
  }

  std::vector<at::Tensor> parameters_;
  std::vector<Accumulator> accumulators_;
  std::vector<uintptr_t> keys_;
  std::shared_ptr<State> state_;
  bool notifies_;
  std::atomic<int64_t> converted_{0};
};

class GradientHooks {
 public:
  GradientHooks(std::vector<at::Tensor> parameters, py::object on_backward_end)
      : state_(std::make_shared<State>(parameters.size())),
        arms_(std::make_shared<Arms>(std::move(parameters), state_, !on_backward_end.is_none())) {
    if (!on_backward_end.is_none()) state_->on_backward_end = std::move(on_backward_end);
    arms_->watch();
  }
  GradientHooks(const GradientHooks&) = delete;
  GradientHooks& operator=(const GradientHooks&) = delete;
  ~GradientHooks() { remove(); }

  int64_t converted() { return arms_->take_converted(); }

  void remove() {
    state_->enabled.store(false);
    state_->on_backward_end = py::object();
    if (autograd::get_current_graph_task_id() == -1) return arms_->release();
    // A hook of the user's has called: the engine is walking the lists that release() takes hooks out of.
    autograd::Engine::get_default_engine().queue_callback([arms = arms_] { arms->release(); });
  }

  void set_enabled(bool enabled) { state_->enabled.store(enabled); }

  void reset() { std::fill(state_->sightings.begin(), state_->sightings.end(), Sighting{}); }

  void start_step() {
    reset();
    state_->has_fired.store(false);
  }

  bool has_fired() const { return state_->has_fired.load(); }

  int64_t n_fired() const {
    return std::count_if(state_->sightings.begin(), state_->sightings.end(),
                         [](const Sighting& sighting) { return sighting.gradient != nullptr; });
  }

  // Takes the gradients as they are now for what the hooks saw: someone with a right to it has changed them.
  void mark_unmodified() {
    for (size_t k = 0; k < parameters().size(); ++k) {
      if (state_->sightings[k].gradient != nullptr) state_->sightings[k] = sighting_of(parameters()[k].grad());
    }
  }

  std::vector<bool> fired() const {
    std::vector<bool> result(parameters().size());
    for (size_t k = 0; k < result.size(); ++k) result[k] = state_->sightings[k].gradient != nullptr;
    return result;
  }

  // True where a gradient that a hook saw was changed or replaced since.
  bool modified() const {
    for (size_t k = 0; k < parameters().size(); ++k) {
      if (is_modified(k, parameters()[k].grad())) return true;
    }
    return false;
  }

  // Writes the rows [K, 6] of all gradients, sparing a Python object for each of them, if all are regular and lie where
  // the rows do; and looks at the hooks on the way, because to come by a gradient costs as much as its statistics.
  // Returns whether the rows are written, modified() and n_fired().
  std::tuple<bool, bool, int64_t> measure(const std::optional<at::Tensor>& rows) const {
    const size_t n_parameters = parameters().size();
    bool is_measured = rows.has_value();
    bool is_modified = false;
    int64_t n_fired = 0;
    const bool on_cpu = is_measured && rows->device().is_cpu();
    cpu::Work work(on_cpu ? static_cast<int64_t>(n_parameters) : 0);
    std::vector<at::Tensor> gradients;
    if (is_measured && !on_cpu) gradients.reserve(n_parameters);
    for (size_t k = 0; k < n_parameters; ++k) {
      const at::Tensor& gradient = parameters()[k].grad();
      n_fired += state_->sightings[k].gradient != nullptr ? 1 : 0;
      is_modified = is_modified || this->is_modified(k, gradient);
      is_measured = is_measured && is_regular(gradient, parameters()[k]) && gradient.device() == rows->device();
      if (!is_measured) continue;
      if (on_cpu) {
        is_measured = add_to(work, gradient);
      } else {
        gradients.push_back(gradient);
      }
    }
    if (is_measured && on_cpu) {
      TORCH_CHECK(takes_rows(*rows, work.n_tensors()), "rows: needed a contiguous float64 tensor of shape [",
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
    return {is_measured, is_modified, n_fired};
  }

  // The gradients [K] with None where there is none, and whether all are regular.
  std::pair<py::list, bool> gradients() const {
    py::list result(parameters().size());
    bool regular = true;
    for (size_t k = 0; k < parameters().size(); ++k) {
      const at::Tensor& gradient = parameters()[k].grad();
      regular = regular && is_regular(gradient, parameters()[k]);
      result[k] = gradient.defined() ? py::cast(gradient) : py::none();
    }
    return {std::move(result), regular};
  }

 private:
  const std::vector<at::Tensor>& parameters() const { return arms_->parameters(); }

  bool is_modified(size_t k, const at::Tensor& gradient) const {
    const Sighting& sighting = state_->sightings[k];
    if (sighting.gradient == nullptr) return false;
    const Sighting now = sighting_of(gradient);
    return now.gradient != sighting.gradient || now.version != sighting.version;
  }

  std::shared_ptr<State> state_;
  std::shared_ptr<Arms> arms_;
};

}  // namespace
}  // namespace gradprobe

PYBIND11_MODULE(_hooks, module) {
  gradprobe::define_signals(module);
  module.def("grad_stats_into", &gradprobe::grad_stats_into, py::arg("tensors"), py::arg("out"));
  py::class_<gradprobe::GradientHooks>(module, "GradientHooks")
      .def(py::init<std::vector<at::Tensor>, py::object>(), py::arg("parameters"), py::arg("on_backward_end"))
      .def("converted", &gradprobe::GradientHooks::converted)
      .def("remove", &gradprobe::GradientHooks::remove)
      .def("set_enabled", &gradprobe::GradientHooks::set_enabled, py::arg("enabled"))
      .def("reset", &gradprobe::GradientHooks::reset)
      .def("start_step", &gradprobe::GradientHooks::start_step)
      .def("has_fired", &gradprobe::GradientHooks::has_fired)
      .def("n_fired", &gradprobe::GradientHooks::n_fired)
      .def("mark_unmodified", &gradprobe::GradientHooks::mark_unmodified)
      .def("fired", &gradprobe::GradientHooks::fired)
      .def("modified", &gradprobe::GradientHooks::modified)
      .def("measure", &gradprobe::GradientHooks::measure, py::arg("rows"))
      .def("gradients", &gradprobe::GradientHooks::gradients);
}
