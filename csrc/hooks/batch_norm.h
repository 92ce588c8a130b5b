// Batch normalisation fused with a residual add and a ReLU.
#pragma once

#include <pybind11/pybind11.h>

namespace gradprobe {

// Adds batch_norm_relu to the Python module.
void define_batch_norm(pybind11::module_& module);

}  // namespace gradprobe
