// Autograd hooks in C++. They are built against one exact torch: the hook classes are not part of the stable ABI.
#include "hooks/gradient_hooks.h"

#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <utility>

namespace gradprobe {

namespace autograd = torch::autograd;

// Outlives its GradientHooks if a graph still holds an accumulator. It holds no parameter, so that no cycle keeps a
// model alive.
struct HookState {
  explicit HookState(size_t n_parameters) : seen(n_parameters) {}

  std::vector<SeenGradient> seen;  // [K]; no locks: the engine never runs an accumulator twice at the same time
  std::atomic<bool> enabled{true};
  std::atomic<bool> has_fired{false};  // enabled or not
  std::atomic<int> queued_task{-1};    // graph task whose end has a callback; a failed backward pass leaves a stale id
  py::object on_backward_end;          // null once removed, so that the last owner needs no GIL
};

namespace {

using Accumulator = decltype(autograd::impl::grad_accumulator(std::declval<const at::Tensor&>()));

void notify(const std::shared_ptr<HookState>& state) {
  state->queued_task.store(-1);
  if (!state->enabled.load()) return;
  py::gil_scoped_acquire gil;
  if (state->on_backward_end) state->on_backward_end();
}

class ReadyHook final : public autograd::FunctionPostHook {
 public:
  ReadyHook(std::shared_ptr<HookState> state, size_t index, autograd::Node* accumulator, bool notifies)
      : state_(std::move(state)), index_(index), accumulator_(accumulator), notifies_(notifies) {}

  autograd::variable_list operator()(const autograd::variable_list& outputs,
                                     const autograd::variable_list& /*inputs*/) override {
    state_->has_fired.store(true, std::memory_order_relaxed);
    if (!state_->enabled.load(std::memory_order_relaxed)) return outputs;
    state_->seen[index_] = SeenGradient::of(static_cast<autograd::AccumulateGrad*>(accumulator_)->variable.grad());
    if (notifies_) {
      const int task = autograd::get_current_graph_task_id();
      if (state_->queued_task.exchange(task) != task) {
        autograd::Engine::get_default_engine().queue_callback([state = state_] { notify(state); });
      }
    }
    return outputs;
  }

  // Compiled autograd rejects a graph with a hook that lacks this method. Our hooks take no part in it.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& /*args*/) const override {}

 private:
  std::shared_ptr<HookState> state_;
  size_t index_;
  autograd::Node* accumulator_;  // owns this hook
  bool notifies_;
};

}  // namespace

// Holds the accumulators because they keep their hooks alive.
class ArmedAccumulators : public std::enable_shared_from_this<ArmedAccumulators> {
 public:
  ArmedAccumulators(std::vector<at::Tensor> parameters, std::shared_ptr<HookState> state, bool notifies)
      : parameters_(std::move(parameters)),
        accumulators_(parameters_.size()),
        keys_(parameters_.size(), 0),
        state_(std::move(state)),
        notifies_(notifies) {}

  const std::vector<at::Tensor>& parameters() const { return parameters_; }

  // Hooks every accumulator. A conversion such as model.cuda() gives a parameter a new accumulator without our hook,
  // but a hook on the tensor itself stays and runs just before the accumulator: it hooks the new one.
  void watch() {
    for (size_t k = 0; k < parameters_.size(); ++k) {
      arm(k);
      // not add_hook: it accepts only a tensor without hooks
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
    Watcher(const ArmedAccumulators* owner, std::weak_ptr<ArmedAccumulators> accumulators, size_t index)
        : owner(owner), accumulators(std::move(accumulators)), index(index) {}

    autograd::variable_list operator()(const autograd::variable_list& gradients) override {
      if (const std::shared_ptr<ArmedAccumulators> alive = accumulators.lock()) alive->arm(index);
      return gradients;
    }

    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& /*args*/) const override {}

    const ArmedAccumulators* owner;
    std::weak_ptr<ArmedAccumulators> accumulators;
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
  std::shared_ptr<HookState> state_;
  bool notifies_;
  std::atomic<int64_t> converted_{0};
};

GradientHooks::GradientHooks(std::vector<at::Tensor> parameters, py::object on_backward_end)
    : state_(std::make_shared<HookState>(parameters.size())),
      accumulators_(
          std::make_shared<ArmedAccumulators>(std::move(parameters), state_, /*notifies=*/!on_backward_end.is_none())) {
  if (!on_backward_end.is_none()) state_->on_backward_end = std::move(on_backward_end);
  accumulators_->watch();
}

int64_t GradientHooks::converted() { return accumulators_->take_converted(); }

void GradientHooks::remove() {
  state_->enabled.store(false);
  state_->on_backward_end = py::object();
  if (autograd::get_current_graph_task_id() == -1) return accumulators_->release();
  // Called from a user's hook: the engine is iterating over the lists that release() changes.
  autograd::Engine::get_default_engine().queue_callback([accumulators = accumulators_] { accumulators->release(); });
}

void GradientHooks::set_enabled(bool enabled) { state_->enabled.store(enabled); }

void GradientHooks::reset() { std::fill(state_->seen.begin(), state_->seen.end(), SeenGradient{}); }

void GradientHooks::start_step() {
  reset();
  state_->has_fired.store(false);
}

bool GradientHooks::has_fired() const { return state_->has_fired.load(); }

int64_t GradientHooks::n_fired() const {
  return std::count_if(seen().begin(), seen().end(), [](const SeenGradient& each) { return each.has_fired(); });
}

std::vector<bool> GradientHooks::fired() const {
  std::vector<bool> result(seen().size());
  for (size_t k = 0; k < result.size(); ++k) result[k] = seen()[k].has_fired();
  return result;
}

void GradientHooks::mark_unmodified() {
  for (size_t k = 0; k < parameters().size(); ++k) {
    if (seen()[k].has_fired()) state_->seen[k] = SeenGradient::of(parameters()[k].grad());
  }
}

bool GradientHooks::modified() const {
  for (size_t k = 0; k < parameters().size(); ++k) {
    if (seen()[k].differs_from(parameters()[k].grad())) return true;
  }
  return false;
}

const std::vector<at::Tensor>& GradientHooks::parameters() const { return accumulators_->parameters(); }

const std::vector<SeenGradient>& GradientHooks::seen() const { return state_->seen; }

}  // namespace gradprobe
