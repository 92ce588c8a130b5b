// Hooks that note which gradients a backward pass has made ready. See gradients.h for what is then measured.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace gradprobe {

// The gradient that a hook saw: the tensor's identity and its version, which every write raises.
struct SeenGradient {
  const void* gradient = nullptr;  // null: the hook has not run
  uint32_t version = 0;

  static SeenGradient of(const at::Tensor& gradient) {
    if (!gradient.defined()) return {};
    return {gradient.unsafeGetTensorImpl(), static_cast<uint32_t>(gradient._version())};
  }

  bool has_fired() const { return gradient != nullptr; }

  // Whether the gradient was changed or replaced since the hook saw it.
  bool differs_from(const at::Tensor& now) const {
    if (!has_fired()) return false;
    const SeenGradient current = of(now);
    return current.gradient != gradient || current.version != version;
  }
};

// The state that hooks and owner share.
struct HookState;

// The parameters' gradient accumulators with our hooks on them.
class ArmedAccumulators;

// Hooks on the gradients of K parameters, and a callback at the end of each backward pass that reaches one of them.
class GradientHooks {
 public:
  // on_backward_end: a Python callable, or None for no callback.
  GradientHooks(std::vector<at::Tensor> parameters, pybind11::object on_backward_end);
  GradientHooks(const GradientHooks&) = delete;
  GradientHooks& operator=(const GradientHooks&) = delete;
  ~GradientHooks() { remove(); }

  // Returns how many accumulators were hooked again since the last call, because a conversion had replaced them.
  int64_t converted();

  // Removes the hooks; called from inside a backward pass, at its end.
  void remove();

  void set_enabled(bool enabled);

  // Forgets which gradients were seen.
  void reset();

  // The same, and whether any hook has run.
  void start_step();

  // Whether any hook has run since start_step(), enabled or not.
  bool has_fired() const;

  int64_t n_fired() const;

  std::vector<bool> fired() const;  // [K]

  // Marks the current gradients as unmodified, e.g. after GradScaler.unscale_.
  void mark_unmodified();

  // Whether any gradient was changed or replaced since its hook saw it.
  bool modified() const;

  const std::vector<at::Tensor>& parameters() const;  // [K]
  const std::vector<SeenGradient>& seen() const;      // [K]

 private:
  std::shared_ptr<HookState> state_;
  std::shared_ptr<ArmedAccumulators> accumulators_;
};

}  // namespace gradprobe
