// Convolutions with 3x3 filters, stride 1 and a padding of 1, by Winograd's algorithm.
#pragma once

#include <pybind11/pybind11.h>

namespace gradprobe {

// Adds convolve to the Python module.
void define_convolution(pybind11::module_& module);

}  // namespace gradprobe
