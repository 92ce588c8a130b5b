// Autograd hooks in C++. They are built against one exact torch: the hook classes are not part of the stable ABI.
#include "hooks/gradient_hooks.h"

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <utility>

namespace gradprobe {

namespace autograd = torch::autograd;

// Outlives its GradientHooks while a hook is still on a parameter. It holds no parameter, so that no cycle keeps a
// model alive.
struct HookState : std::enable_shared_from_this<HookState> {
  HookState(size_t n_observed, size_t n_frozen) : slots(n_observed), frozen(n_frozen, nullptr) {}

  // The parameter of slot k; the frozen ones come after the observed ones.
  c10::TensorImpl*& parameter(size_t k) { return k < slots.size() ? slots[k].parameter : frozen[k - slots.size()]; }

  void fail(const char* cause) noexcept {
    const std::lock_guard<std::mutex> lock(mutex);
    if (error.empty()) error = cause;
  }

  std::vector<GradientSlot> slots;  // [K]
  std::atomic<bool> is_removed{false};
  std::atomic<bool> has_fired{false};
  std::atomic<bool> accumulates{false};  // a gradient is the one that mark() saw, with one more write
  std::atomic<bool> is_current{false};   // no hook has run since mark()
  std::atomic<bool> is_outdated{false};
  std::atomic<int> last_awaited{-1};  // graph tasks never get the same number twice
  py::object on_backward_end;         // null once removed, so that the last owner needs no GIL
  py::object on_gradient;
  bool has_on_gradient = false;  // the object itself may be read with the GIL only

  std::mutex mutex;                      // guards what follows, and the slots' parameters
  std::vector<c10::TensorImpl*> frozen;  // parameters that needed no gradient
  std::vector<int> awaited;              // graph tasks whose end is queued; nested ones (checkpoints) end first
  std::string error;
};

namespace {

// Lives in the callbacks queued for one graph task, and goes with them also if the backward pass throws.
class Awaiting {
 public:
  Awaiting(std::shared_ptr<HookState> state, int task) : state_(std::move(state)), task_(task) {}
  Awaiting(const Awaiting&) = delete;
  Awaiting& operator=(const Awaiting&) = delete;
  ~Awaiting() { end(); }

  // Returns whether no other task is still running.
  bool end() {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    std::erase(state_->awaited, task_);
    return state_->awaited.empty();
  }

  HookState& state() { return *state_; }

 private:
  std::shared_ptr<HookState> state_;
  int task_;
};

void queue(std::function<void()> callback) {
  autograd::Engine::get_default_engine().queue_callback(std::move(callback));
}

void notify(Awaiting& awaiting) {
  HookState& state = awaiting.state();
  if (!awaiting.end() || state.is_removed.load()) return;
  py::gil_scoped_acquire gil;
  const py::object on_backward_end = state.on_backward_end;
  if (on_backward_end) on_backward_end();
}

// Calls back at the end of the running backward pass: after the callbacks that others queue in it, e.g. those in which
// DistributedDataParallel waits for its reductions. Hence the second round.
void await_end(HookState& state) {
  const int task = autograd::get_current_graph_task_id();
  if (task == -1 || state.last_awaited.load(std::memory_order_relaxed) == task) return;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    state.last_awaited.store(task, std::memory_order_relaxed);
    if (std::find(state.awaited.begin(), state.awaited.end(), task) != state.awaited.end()) return;
    state.awaited.push_back(task);
  }
  const auto awaiting = std::make_shared<Awaiting>(state.shared_from_this(), task);
  queue([awaiting] { queue([awaiting] { notify(*awaiting); }); });
}

void note(HookState& state, size_t k, const at::Tensor& parameter) {
  if (k >= state.slots.size()) {
    state.is_outdated.store(true, std::memory_order_relaxed);
    return;
  }
  state.has_fired.store(true, std::memory_order_relaxed);
  state.is_current.store(false, std::memory_order_relaxed);
  const at::Tensor& gradient = parameter.grad();
  GradientSlot& slot = state.slots[k];
  const GradientId now = GradientId::of(gradient), seen = slot.seen();
  if (now.gradient != nullptr && now.gradient == seen.gradient && now.version == seen.version + 1) {
    state.accumulates.store(true, std::memory_order_relaxed);
  }
  slot.see(now);
  slot.has_fired.store(true, std::memory_order_relaxed);
  if (state.has_on_gradient) {
    py::gil_scoped_acquire gil;
    const py::object on_gradient = state.on_gradient;
    if (on_gradient && gradient.defined()) on_gradient(k, gradient);
  }
  await_end(state);
}

// Hooks that were taken off. A backward pass in another thread may be about to call one, so they are freed much later.
class Retired {
 public:
  using Clock = std::chrono::steady_clock;

  void add(std::vector<std::unique_ptr<autograd::PostAccumulateGradHook>> hooks) {
    const auto now = Clock::now();
    free_older_than(now - std::chrono::minutes(1));
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& hook : hooks) all_.push_back({now, std::move(hook)});
  }

  void free_older_than(Clock::time_point limit) {
    std::vector<std::unique_ptr<autograd::PostAccumulateGradHook>> old;  // goes after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!all_.empty() && all_.front().since < limit) {
      old.push_back(std::move(all_.front().hook));
      all_.pop_front();
    }
  }

 private:
  struct Entry {
    Clock::time_point since;
    std::unique_ptr<autograd::PostAccumulateGradHook> hook;
  };
  std::mutex mutex_;
  std::deque<Entry> all_;
};

Retired& retired() {
  static auto* all = new Retired();  // never destroyed: a daemon thread may be in a backward pass at exit
  return *all;
}

// A post-accumulate hook around whatever hook the parameter has. It lives in the parameter's own autograd metadata.
// Places of hooks change under the GIL, by one store each: a backward pass in another thread, which needs no GIL, finds
// a hook or the one around it, never an empty place.
class Around final : public autograd::PostAccumulateGradHook {
 public:
  static void put(std::unique_ptr<autograd::PostAccumulateGradHook>& place, const std::shared_ptr<HookState>& state,
                  size_t k, c10::TensorImpl* parameter) {
    auto* around = new Around(state, k, parameter, place.get());
    std::unique_ptr<autograd::PostAccumulateGradHook> other(around);
    std::atomic_thread_fence(std::memory_order_release);  // torch reads the place without one: first the whole hook
    place.swap(other);
    around->inner_ = std::move(other);
  }
  Around(const Around&) = delete;
  Around& operator=(const Around&) = delete;

  // Either the parameter dies, or somebody put a hook in our place: the first register_post_accumulate_grad_hook makes
  // torch's own hook and assigns it. The assignment stores the newcomer before it deletes us: go around it.
  ~Around() override {
    {
      const std::lock_guard<std::mutex> lock(state_->mutex);
      if (state_->parameter(index_) != parameter_) return;  // taken off: the parameter may be long gone
      const bool is_replaced = c10::raw::intrusive_ptr::use_count(parameter_) > 0;
      if (!is_replaced || state_->is_removed.load()) {
        state_->parameter(index_) = nullptr;
        state_->is_outdated.store(true);
        return;
      }
    }
    auto& place = static_cast<autograd::AutogradMeta*>(parameter_->autograd_meta())->post_acc_grad_hooks_;
    put(place, state_, index_, parameter_);
  }

  void operator()(const at::Tensor& parameter) override {
    // A callback may put a hook in our place, which frees us, but not the state, which the hook around that one owns.
    HookState& state = *state_;
    autograd::PostAccumulateGradHook* inner = called_.load();
    if (!state.is_removed.load(std::memory_order_relaxed)) {
      try {
        note(state, index_, parameter);
      } catch (py::error_already_set&) {
        throw;  // the Python side lets nothing through unless it is told to
      } catch (const std::exception& error) {
        state.fail(error.what());
      }
    }
    if (inner != nullptr) (*inner)(parameter);
  }

  // Compiled autograd calls hooks in Python only: ours takes no part in it.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    if (inner_) inner_->compiled_args(args);
  }
  void apply_with_saved(at::Tensor& tensor, torch::dynamo::autograd::SwapSavedVariables& saved) override {
    if (inner_) inner_->apply_with_saved(tensor, saved);
  }

  // Takes the state's hook out of a place; null if it is not there. The hooks of other probes may be around it.
  static std::unique_ptr<autograd::PostAccumulateGradHook> take(
      std::unique_ptr<autograd::PostAccumulateGradHook>& place, const std::shared_ptr<HookState>& state) {
    auto* hook = dynamic_cast<Around*>(place.get());
    if (hook == nullptr) return nullptr;
    if (hook->state_ == state) {
      std::unique_ptr<autograd::PostAccumulateGradHook> taken = std::move(hook->inner_);
      place.swap(taken);
      return taken;
    }
    auto taken = take(hook->inner_, state);
    hook->called_.store(hook->inner_.get());
    return taken;
  }

 private:
  Around(std::shared_ptr<HookState> state, size_t k, c10::TensorImpl* parameter,
         autograd::PostAccumulateGradHook* called)
      : state_(std::move(state)), index_(k), parameter_(parameter), called_(called) {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->parameter(k) = parameter;
  }

  std::shared_ptr<HookState> state_;
  size_t index_;
  c10::TensorImpl* parameter_;
  std::unique_ptr<autograd::PostAccumulateGradHook> inner_;
  // The hook inside; still so once we are taken off, when another owns it: a call that has begun passes on to it.
  std::atomic<autograd::PostAccumulateGradHook*> called_;
};

void put_around(const std::shared_ptr<HookState>& state, size_t k, const at::Tensor& parameter) {
  autograd::impl::materialize_autograd_meta(parameter);  // a copy of a frozen parameter has none
  Around::put(autograd::impl::post_acc_grad_hooks(parameter), state, k, parameter.unsafeGetTensorImpl());
}

// The parameters that still have a hook of ours, owned for the moment. The lock keeps their memory: the destructor of
// the hook takes it, too. weak.lock() refuses a parameter that is already dying.
std::vector<at::Tensor> living(HookState& state, size_t begin, size_t end) {
  std::vector<at::Tensor> result(end - begin);
  const std::lock_guard<std::mutex> lock(state.mutex);
  for (size_t k = begin; k < end; ++k) {
    c10::TensorImpl* parameter = state.parameter(k);
    if (parameter == nullptr) continue;
    c10::raw::weak_intrusive_ptr::incref(parameter);
    const auto weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim(parameter);
    if (auto strong = weak.lock()) result[k - begin] = at::Tensor(std::move(strong));
  }
  return result;
}

}  // namespace

GradientHooks::GradientHooks(const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& frozen,
                             py::object on_backward_end, py::object on_gradient)
    : state_(std::make_shared<HookState>(parameters.size(), frozen.size())) {
  if (!on_backward_end.is_none()) state_->on_backward_end = std::move(on_backward_end);
  if (!on_gradient.is_none()) {
    state_->on_gradient = std::move(on_gradient);
    state_->has_on_gradient = true;
  }
  for (size_t k = 0; k < parameters.size(); ++k) {
    GradientSlot& slot = state_->slots[k];
    slot.dtype = parameters[k].scalar_type();
    slot.device = parameters[k].device();
    slot.numel = parameters[k].numel();
  }
  try {
    for (size_t k = 0; k < parameters.size(); ++k) put_around(state_, k, parameters[k]);
    for (size_t k = 0; k < frozen.size(); ++k) put_around(state_, parameters.size() + k, frozen[k]);
  } catch (...) {
    remove();  // no destructor runs after this
    throw;
  }
}

void GradientHooks::remove() {
  if (state_->is_removed.exchange(true)) return;
  state_->on_backward_end = py::object();
  state_->on_gradient = py::object();
  std::vector<std::unique_ptr<autograd::PostAccumulateGradHook>> taken;
  for (const at::Tensor& parameter : living(*state_, 0, state_->slots.size() + state_->frozen.size())) {
    if (!parameter.defined()) continue;
    if (auto hook = Around::take(autograd::impl::post_acc_grad_hooks(parameter), state_)) {
      taken.push_back(std::move(hook));
    }
  }
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    for (size_t k = 0; k < state_->slots.size() + state_->frozen.size(); ++k) state_->parameter(k) = nullptr;
  }
  retired().add(std::move(taken));
}

void free_removed_hooks() { retired().free_older_than(Retired::Clock::time_point::max()); }

void GradientHooks::start_step() {
  for (GradientSlot& slot : state_->slots) {
    slot.has_fired.store(false, std::memory_order_relaxed);
    slot.is_known.store(false, std::memory_order_relaxed);  // what was done to it since is no change of this step's
  }
  state_->has_fired.store(false);
  state_->accumulates.store(false);
}

bool GradientHooks::has_fired() const { return state_->has_fired.load(); }

int64_t GradientHooks::n_fired() const {
  return std::count_if(slots().begin(), slots().end(), [](const GradientSlot& each) { return each.has_fired.load(); });
}

std::vector<bool> GradientHooks::fired() const {
  std::vector<bool> result(slots().size());
  for (size_t k = 0; k < result.size(); ++k) result[k] = slots()[k].has_fired.load();
  return result;
}

void GradientHooks::mark() {
  const auto held = lock();
  for (size_t k = 0; k < slots().size(); ++k) state_->slots[k].see(GradientId::of(gradient(k)));
  set_current();
}

bool GradientHooks::is_current() const { return state_->is_current.load(); }

void GradientHooks::set_current() { state_->is_current.store(true); }

int64_t GradientHooks::n_writes() const {
  const auto held = lock();
  int64_t most = 0;
  for (size_t k = 0; k < slots().size(); ++k) {
    if (slots()[k].parameter != nullptr) most = std::max(most, slots()[k].n_writes(gradient(k)));
  }
  return most;
}

// A parameter whose count has fallen to 0 waits for the lock in the destructor of our hook, its gradient still alive.
std::unique_lock<std::mutex> GradientHooks::lock() const { return std::unique_lock<std::mutex>(state_->mutex); }

const at::Tensor& GradientHooks::gradient(size_t k) const {
  static const at::Tensor nothing;
  const c10::TensorImpl* parameter = state_->slots[k].parameter;
  return parameter == nullptr ? nothing : parameter->grad();
}

bool GradientHooks::accumulates() const { return state_->accumulates.load(); }

bool GradientHooks::is_outdated() const { return state_->is_outdated.load(); }

std::string GradientHooks::take_error() {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return std::exchange(state_->error, {});
}

std::vector<at::Tensor> GradientHooks::parameters() const { return living(*state_, 0, state_->slots.size()); }

const std::vector<GradientSlot>& GradientHooks::slots() const { return state_->slots; }

std::vector<GradientSlot>& GradientHooks::slots() { return state_->slots; }

}  // namespace gradprobe
