// Hooks that note which gradients a backward pass has made ready. See gradients.h for what is then measured.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace gradprobe {

inline constexpr int64_t kReplaced = 1 << 30;  // stands for any number of writes

// A gradient at one moment: the tensor's identity and its version, which every write raises.
struct GradientId {
  const void* gradient = nullptr;
  uint32_t version = 0;

  static GradientId of(const at::Tensor& gradient) {
    if (!gradient.defined()) return {};
    // an inference tensor has no version
    const uint32_t version = gradient.is_inference() ? 0 : static_cast<uint32_t>(gradient._version());
    return {gradient.unsafeGetTensorImpl(), version};
  }

  bool operator==(const GradientId&) const = default;
};

// What is known of one parameter. A backward pass writes while another thread may read, hence the atomics.
struct GradientSlot {
  // The gradient as the hook or the measurement last saw it.
  void see(const GradientId& now) {
    gradient.store(now.gradient, std::memory_order_relaxed);
    version.store(now.version, std::memory_order_relaxed);
    is_known.store(true, std::memory_order_relaxed);
  }
  GradientId seen() const {
    return {gradient.load(std::memory_order_relaxed), version.load(std::memory_order_relaxed)};
  }
  // How often the gradient was written to since it was seen; kReplaced if it is another tensor now.
  int64_t n_writes(const at::Tensor& gradient) const {
    if (!is_known.load(std::memory_order_relaxed)) return 0;
    const GradientId now = GradientId::of(gradient), before = seen();
    return now.gradient == before.gradient ? static_cast<int64_t>(now.version) - before.version : kReplaced;
  }

  std::atomic<const void*> gradient{nullptr};
  std::atomic<uint32_t> version{0};
  std::atomic<bool> is_known{false};
  std::atomic<bool> has_fired{false};
  c10::TensorImpl* parameter = nullptr;  // while our hook is on it; guarded by the state's mutex
  // the parameter as it was when the hooks were made
  at::ScalarType dtype = at::kFloat;
  c10::Device device = at::kCPU;
  int64_t numel = 0;
};

// The state that hooks and owner share.
struct HookState;

// Hooks on the gradients of K parameters, and a callback at the end of each backward pass that reaches one of them.
// Neither a parameter nor a node of autograd is kept alive.
class GradientHooks {
 public:
  // frozen: parameters that need no gradient yet; when one gets one, has_newcomers() tells.
  // on_backward_end: called without arguments at the end of each backward pass.
  // on_gradient: called with k and gradient k as soon as it is ready; both may be None.
  GradientHooks(const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& frozen,
                pybind11::object on_backward_end, pybind11::object on_gradient);
  GradientHooks(const GradientHooks&) = delete;
  GradientHooks& operator=(const GradientHooks&) = delete;
  ~GradientHooks() { remove(); }

  // Removes the hooks. Another thread may be in a backward pass, and so may the caller.
  void remove();

  // Begins a step: forgets which gradients were seen and which hooks have run.
  void start_step();

  // Whether any hook has run since start_step().
  bool has_fired() const;

  int64_t n_fired() const;

  std::vector<bool> fired() const;  // [K]

  // Notes the gradients as they are now; n_writes() tells how often one was written to since, at most.
  void mark();
  int64_t n_writes() const;

  // Whether no hook has run since the gradients were marked; a backward pass that throws leaves some that are not.
  bool is_current() const;
  void set_current();

  // Whether a backward pass of this step added to the gradients that mark() saw, rather than begin new ones.
  bool accumulates() const;

  // Whether a parameter lost its hook (it was swapped or has died) or a frozen one got a gradient.
  bool is_outdated() const;

  // What went wrong inside a hook, once; empty if nothing did.
  std::string take_error();

  std::vector<at::Tensor> parameters() const;  // [K], undefined where the parameter is gone

  // While it is held, no parameter dies, and gradient() may be called.
  std::unique_lock<std::mutex> lock() const;
  const at::Tensor& gradient(size_t k) const;  // undefined if there is none

  const std::vector<GradientSlot>& slots() const;
  std::vector<GradientSlot>& slots();

 private:
  std::shared_ptr<HookState> state_;
};

// Frees the hooks that were removed, which otherwise happens a minute later. No backward pass may be running.
void free_removed_hooks();

}  // namespace gradprobe
