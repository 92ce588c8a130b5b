// Observes activations and residual adds, forward and backward, from C++.
#pragma once

#include <pybind11/pybind11.h>

namespace gradprobe {

// Adds EventRows, OutputHooks, JunctionHooks and residual_add to the Python module.
void define_signals(pybind11::module_& module);

}  // namespace gradprobe
