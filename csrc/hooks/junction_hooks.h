// Residual adds, observed forward and backward.
#pragma once

#include <pybind11/pybind11.h>

namespace gradprobe {

// Adds JunctionHooks and residual_add to the Python module.
void define_junction_hooks(pybind11::module_& module);

}  // namespace gradprobe
