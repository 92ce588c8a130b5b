// The Python module gradprobe._hooks.
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "hooks/gradient_hooks.h"
#include "hooks/gradients.h"
#include "hooks/signals.h"

PYBIND11_MODULE(_hooks, module) {
  using gradprobe::GradientHooks;
  gradprobe::define_signals(module);
  module.def("grad_stats_into", &gradprobe::grad_stats_into, py::arg("tensors"), py::arg("out"));
  py::class_<GradientHooks>(module, "GradientHooks")
      .def(py::init<std::vector<at::Tensor>, py::object>(), py::arg("parameters"), py::arg("on_backward_end"))
      .def("converted", &GradientHooks::converted)
      .def("remove", &GradientHooks::remove)
      .def("set_enabled", &GradientHooks::set_enabled, py::arg("enabled"))
      .def("reset", &GradientHooks::reset)
      .def("start_step", &GradientHooks::start_step)
      .def("has_fired", &GradientHooks::has_fired)
      .def("n_fired", &GradientHooks::n_fired)
      .def("mark_unmodified", &GradientHooks::mark_unmodified)
      .def("fired", &GradientHooks::fired)
      .def("modified", &GradientHooks::modified)
      .def("measure", &gradprobe::measure, py::arg("rows"))
      .def("gradients", &gradprobe::list_gradients);
}
