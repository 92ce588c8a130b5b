// Hooks on module outputs and their gradients.
#pragma once

#include <pybind11/pybind11.h>

namespace gradprobe {

// Adds OutputHooks to the Python module.
void define_output_hooks(pybind11::module_& module);

}  // namespace gradprobe
