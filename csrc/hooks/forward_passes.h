// What the hooks and the operators in C++ share: which forward passes they observe, and in which state of torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hooks/plain_tensor.h"

namespace gradprobe {

namespace autograd = torch::autograd;

// Whether operators simply run: no tracer, no torch.func transform, no forward-mode AD, no torch mode.
inline bool is_plain_execution() {
  return !is_watched() && !torch::jit::tracer::isTracing() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !autograd::ForwardADLevel::try_get_by_idx(0);
}

// Returns the tensor of a Python object that is exactly a torch.Tensor, else null.
inline const at::Tensor* exact_tensor(py::handle object) {
  return THPVariable_CheckExact(object.ptr()) ? &THPVariable_Unpack(object.ptr()) : nullptr;
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

// Tells a checkpoint's recomputation from a first forward pass, like ForwardPasses in
// gradprobe/observers/observable.py.
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

}  // namespace gradprobe
