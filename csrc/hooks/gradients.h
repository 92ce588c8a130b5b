// Measures gradients straight from C++: no Python object per gradient, and no dispatcher on the CPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "hooks/gradient_hooks.h"

namespace gradprobe {

// Computes gradprobe::grad_stats_into for plain CPU tensors with a direct call: for a small tensor, dispatch takes
// longer than the statistics. Returns false, and writes nothing, if the operator has to see the call.
bool grad_stats_into(const std::vector<at::Tensor>& tensors, const at::Tensor& out);

// Writes the rows [K, 6] of all gradients, if all are regular and on the device of `rows`, and marks them as seen. The
// same loop checks the hooks, because fetching a gradient costs as much as its statistics.
//
// Returns whether the rows were written, hooks.n_writes() as it was before, and hooks.n_fired().
std::tuple<bool, int64_t, int64_t> measure(GradientHooks& hooks, const std::optional<at::Tensor>& rows);

// Returns the gradients [K], None for a parameter without one, and whether all are regular.
std::pair<pybind11::list, bool> list_gradients(const GradientHooks& hooks);

// Returns the parameters [K], None for one that is gone.
pybind11::list list_parameters(const GradientHooks& hooks);

}  // namespace gradprobe
