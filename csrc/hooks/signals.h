// Observing what passes by in forward and backward, from C++: see signals.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace gradprobe {

void define_signals(pybind11::module_& module);

}  // namespace gradprobe
