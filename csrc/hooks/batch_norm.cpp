// Batch normalisation in C++, because in Python the call takes longer than the kernel on a small tensor. Handles plain
// tensors in plain autograd.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wstringop-overflow"  // false positive of GCC 12 in torch's reference counts
#endif

#include "hooks/batch_norm.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "hooks/batch_norm_node.h"
#include "hooks/forward_passes.h"

namespace gradprobe {
namespace {

// Returns batch_norm(x) [+ shortcut], or its positive part; None, and does nothing, if the kernel does not take the
// tensors or an operator has to see the call.
std::optional<at::Tensor> normalise(py::handle x, py::handle shortcut, py::handle weight, py::handle bias,
                                    py::handle running_mean, py::handle running_var, double momentum, double eps,
                                    bool relu) {
  NormTensors of;
  const auto take = [](py::handle object, at::Tensor& tensor, bool may_be_none) {
    if (may_be_none && object.is_none()) return true;
    const at::Tensor* exact = exact_tensor(object);
    if (exact != nullptr) tensor = *exact;
    return exact != nullptr;
  };
  if (!take(x, of.x, false) || !take(shortcut, of.shortcut, true) || !take(weight, of.weight, false) ||
      !take(bias, of.bias, false) || !take(running_mean, of.running_mean, true) ||
      !take(running_var, of.running_var, true)) {
    return std::nullopt;
  }
  if (!is_simple_norm(of) || !is_plain_execution()) return std::nullopt;
  return keeping_python_errors([&] { return batch_norm_relu(of, momentum, eps, relu); });
}

}  // namespace

void define_batch_norm(py::module_& module) {
  module.def("batch_norm_relu", &normalise, py::arg("x"), py::arg("shortcut"), py::arg("weight"), py::arg("bias"),
             py::arg("running_mean"), py::arg("running_var"), py::arg("momentum"), py::arg("eps"), py::arg("relu"));
}

}  // namespace gradprobe
